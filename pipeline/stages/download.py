"""Bring the competition's files in, check each, and write what they are: data/manifest.json and truth.csv."""

import sys
from pathlib import Path

from pipeline.config import DataSettings, Params
from pipeline.data import ingest
from pipeline.data.competition_data import CompetitionData
from pipeline.data.ingest import build_manifest, write_truth
from pipeline.stages.runner import run_stage
from pipeline.utils.files import write_json
from pipeline.workspace import project_root


def bring_in(settings: DataSettings, root: Path, *, thorough: bool = False) -> CompetitionData:
    """Make sure that the files are there, fetched from Kaggle or drawn where that is asked for, and return them.

    ``thorough`` reads all bytes of what was fetched before, where else size and time are trusted.
    """
    if settings.is_from_kaggle:
        from pipeline.kaggle.commands import download_competition  # a third of a second, for those who need it

        download_competition(settings, root, thorough=thorough)
    return ingest.ensure_data(settings, root)


def run(params: Params) -> None:
    """Read ``data``; write the manifest. The files themselves stay outside DVC."""
    source = bring_in(params.data, project_root())
    manifest = build_manifest(source, params.data.on_corrupt)
    for message in manifest["suspect_test_images"].values():
        print(f"warning: {message} Its row will be the mean mask of its angle.", file=sys.stderr)
    write_truth(source, Path("data/truth.csv"))
    write_json(Path("data/manifest.json"), manifest)


if __name__ == "__main__":
    run_stage(run, __doc__)
