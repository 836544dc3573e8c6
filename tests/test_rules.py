"""What a command must not load. Which package may import which is in pyproject.toml: see ``lint-imports``."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.competition.image_ids import format_image_id

ROOT = Path(__file__).parents[1]


def loaded(code: str, folder: Path = ROOT) -> set[str]:
    """The top-level modules that a fresh Python has loaded after some code."""
    code += "\nimport sys; print('loaded', *{name.split('.')[0] for name in sys.modules})"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.splitlines()[-1].split()[1:])


HEAVY = {"torch", "lightning", "albumentations", "torchvision", "timm", "segmentation_models_pytorch"}


def test_the_command_line_itself_loads_next_to_nothing() -> None:
    assert loaded("import pipeline.cli").isdisjoint(HEAVY | {"numpy", "pandas", "cv2", "ruamel"})


@pytest.mark.parametrize("command", ["check", "score"])
def test_checking_and_scoring_a_csv_never_load_torch(tmp_path: Path, command: str) -> None:
    (tmp_path / "a.csv").write_text(f"img,rle_mask\n{format_image_id('00087a6bd4dc', 1)}.jpg,1 5\n")
    arguments = ["check", "a.csv"] if command == "check" else ["score", "a.csv", "--truth", "a.csv"]
    code = f"""
from pipeline.cli import main
try:
    main({arguments})
except SystemExit as end:
    assert not end.code, end
"""
    modules = loaded(code, tmp_path)
    assert "numpy" in modules
    assert modules.isdisjoint(HEAVY)


def test_settings_and_the_stages_without_nets_never_load_torch() -> None:
    stages = ("download", "folds", "evaluate", "ensemble", "report")
    commands = "pipeline.repro, pipeline.report.experiments"
    modules = loaded(
        f"import pipeline.recipes, {', '.join(f'pipeline.stages.{stage}' for stage in stages)}, {commands}"
    )
    assert "pandas" in modules
    assert modules.isdisjoint(HEAVY)


def test_prediction_loads_neither_lightning_nor_albumentations() -> None:
    modules = loaded("import pipeline.inference.torch_predictor")
    assert "torch" in modules
    assert modules.isdisjoint({"lightning", "albumentations"})
