"""``carvana repro``: dvc repro between a look at DVC's files and the scores."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.config import DataSettings, read_params
from pipeline.data.competition_data import CompetitionData
from pipeline.data.ingest import ensure_data
from pipeline.errors import CarvanaError
from pipeline.workspace import project_root


def repro(arguments: Sequence[str]) -> bool:
    """Run ``dvc repro`` with ``arguments``; return whether that ran the whole pipeline.

    Raises CarvanaError if DVC's files are truncated, or dvc fails.
    """
    params = read_params()
    check_dvc_lock(Path.cwd())
    if "--dry" not in arguments:
        # DVC may take the manifest from its cache, without a look at whether the files that it stands for are there.
        provide_data(params.data, project_root())
    status = subprocess.run([sys.executable, "-m", "dvc", "repro", *arguments], check=False).returncode
    if status:
        raise CarvanaError("dvc repro stopped: the message above says why. Run the same again; what is done is kept.")
    return not any(argument == "--dry" or not argument.startswith("-") for argument in arguments)


def provide_data(settings: DataSettings, root: Path, *, thorough: bool = False) -> CompetitionData:
    """Download or draw the competition's files where that is asked for and they are missing, and return them.

    ``thorough`` reads every byte of what was downloaded before; otherwise size and time are trusted.
    """
    if settings.is_from_kaggle:
        from pipeline.kaggle.commands import download_competition  # a third of a second, for those who need it

        download_competition(settings, root, thorough=thorough)
    return ensure_data(settings, root)


def check_dvc_lock(project: Path) -> None:
    """Raise CarvanaError if a killed DVC left one of its files truncated, with the way to fix it."""
    lock = project / "dvc.lock"
    if lock.is_file() and _is_torn(lock):
        raise CarvanaError(
            f"{lock} is truncated: a run was killed while DVC wrote it. Take back the last whole one with "
            "'git checkout dvc.lock', or delete it if git has none: finished stages are taken up, not run again."
        )
    guard = project / ".dvc" / "tmp" / "rwlock"
    if guard.is_file():
        try:
            json.loads(guard.read_text(encoding="utf-8") or "{}")
        except ValueError as error:
            raise CarvanaError(f"{guard} is truncated: if no other dvc runs in this project, delete it.") from error


def _is_torn(lock: Path) -> bool:
    """Return whether a file is other than DVC writes it; one cut between two whole entries is sound to DVC too."""
    try:
        text = lock.read_text(encoding="utf-8")
        entries = [
            entry
            for stage in YAML(typ="safe").load(text)["stages"].values()
            for entry in (*stage.get("deps", ()), *stage.get("outs", ()), *stage.get("params", {}).values())
        ]
    except (YAMLError, UnicodeDecodeError, AttributeError, KeyError, TypeError):
        return True
    return not text.endswith("\n") or not all(isinstance(entry, dict) for entry in entries)
