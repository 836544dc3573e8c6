"""Bring the competition's files in, check each, and write what they are: data/manifest.json."""

from pathlib import Path

from pipeline.data.intake import bring_in, inspect
from pipeline.files import write_json
from pipeline.params import Params
from pipeline.places import home
from pipeline.stages.command import stage


def run(params: Params) -> None:
    """Read ``data``; write the manifest. The files themselves stay outside DVC."""
    source = bring_in(params.data, home())
    write_json(Path("data/manifest.json"), inspect(source, params.data.on_corrupt))


if __name__ == "__main__":
    stage(run, __doc__)
