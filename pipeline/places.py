"""Where the project stands, also from inside DVC's temporary copies of it."""

from pathlib import Path

_EXPERIMENTS = (".dvc", "tmp", "exps")


def project_root(workspace: Path | None = None) -> Path:
    """Return the project's own root, which is the workspace itself except in a temporary experiment.

    ``dvc exp run --temp`` and ``--queue`` run in copies below ``.dvc/tmp/exps``. What is too large to copy, the
    competition's files and the state of resumes, is shared by all of them and lies in the project's own root.
    """
    path = (workspace or Path.cwd()).resolve()
    parts = path.parts
    for start in range(len(parts) - len(_EXPERIMENTS)):
        if parts[start : start + len(_EXPERIMENTS)] == _EXPERIMENTS:
            return Path(*parts[:start])
    return path


def runs_dir(workspace: Path | None = None) -> Path:
    """Return the folder of the logs of all trainings, in the project's own root: ``runs/<model>/<fold>/<run>``."""
    return project_root(workspace) / "runs"
