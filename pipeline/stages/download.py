"""Bring the competition's files in, check each, and write what they are: data/manifest.json and truth.csv."""

import sys
from pathlib import Path

from pipeline.config import Params
from pipeline.data.ingest import build_manifest, write_truth
from pipeline.repro import provide_data
from pipeline.utils.files import write_json
from pipeline.workspace import project_root


def run(params: Params) -> None:
    """Read ``data``; write the manifest. The files themselves stay outside DVC."""
    source = provide_data(params.data, project_root())
    manifest = build_manifest(source, params.data.on_corrupt)
    for message in manifest["suspect_test_images"].values():
        print(f"warning: {message} Its row will be the mean mask of its angle.", file=sys.stderr)
    write_truth(source, Path("data/truth.csv"))
    write_json(Path("data/manifest.json"), manifest)
