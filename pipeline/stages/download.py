"""Get and check the competition's files; write data/manifest.json and truth.csv."""

import sys
from pathlib import Path

from pipeline.config import Params
from pipeline.data.ingest import build_manifest, write_truth
from pipeline.repro import provide_data
from pipeline.utils.files import write_json
from pipeline.workspace import project_root


def run(params: Params) -> None:
    """Read the settings in ``data``; write the manifest. The files themselves are not tracked by DVC."""
    source = provide_data(params.data, project_root())
    manifest = build_manifest(source, params.data.on_corrupt)
    for message in manifest["suspect_test_images"].values():
        print(f"warning: {message} The submission uses the mean mask of its angle instead.", file=sys.stderr)
    write_truth(source, Path("data/truth.csv"))
    write_json(Path("data/manifest.json"), manifest)
