"""``carvana repro``: dvc repro between a look at DVC's files and the scores."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.config import read_params
from pipeline.errors import CarvanaError
from pipeline.report.summary import format_summary
from pipeline.stages.download import bring_in
from pipeline.workspace import project_root


def repro(arguments: Sequence[str]) -> None:
    """Run ``dvc repro`` with ``arguments``; raises CarvanaError if DVC's files are truncated, or it fails."""
    params = read_params()
    check_dvc_lock(Path.cwd())
    if "--dry" not in arguments:
        # DVC may take the manifest from its cache, without a look at whether the files that it stands for are there.
        bring_in(params.data, project_root())
    status = subprocess.run([sys.executable, "-m", "dvc", "repro", *arguments], check=False).returncode
    if status:
        raise CarvanaError("dvc repro stopped: the message above says why. Run the same again; what is done is kept.")
    if not any(argument == "--dry" or not argument.startswith("-") for argument in arguments):  # else not all of it ran
        show_summary()


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


def show_summary() -> None:
    """Print the scores of the last run; raises CarvanaError if there was none."""
    try:
        evaluation = json.loads(Path("reports/evaluation.json").read_text(encoding="utf-8"))
        submission = json.loads(Path("submissions/submission.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise CarvanaError(f"{error.filename} is missing: run 'carvana repro' first.") from error
    print(format_summary(evaluation, submission))
