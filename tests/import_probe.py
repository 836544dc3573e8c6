"""What a fresh Python loads."""

import subprocess
import sys
from pathlib import Path

from tests import ROOT

HEAVY_MODULES = {"torch", "lightning", "albumentations", "torchvision", "timm", "segmentation_models_pytorch"}


def loaded_modules(code: str, folder: Path = ROOT) -> set[str]:
    """The top-level modules that a fresh Python has loaded after some code."""
    code += "\nimport sys; print('loaded', *{name.split('.')[0] for name in sys.modules})"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.splitlines()[-1].split()[1:])
