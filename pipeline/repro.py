"""``carvana repro``: check for problems that DVC would report only after the work, then run ``dvc repro``."""

import getpass
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.config import DataSettings, EncoderConfig, Params, read_params
from pipeline.data.competition_data import CompetitionData
from pipeline.data.ingest import ensure_data
from pipeline.errors import CarvanaError
from pipeline.utils.files import read_versioned
from pipeline.workspace import MANIFEST_FILE, dvc_stages, local_encoder_weights, project_root


def repro(arguments: Sequence[str]) -> bool:
    """Run ``dvc repro`` with ``arguments``, and return whether they select the whole pipeline.

    Raises CarvanaError if params.yaml, dvc.lock, an encoder or an output is not usable, if the data cannot be provided,
    or if DVC fails.
    """
    params = read_params()
    check_dvc_lock(Path.cwd())
    check_outputs(Path.cwd())
    if "--dry" not in arguments:
        if not MANIFEST_FILE.is_file():
            check_nets(params)
        # DVC may restore the manifest from its cache although the files that it describes are missing.
        provide_data(params.data, project_root())
    status = subprocess.run(
        [sys.executable, "-m", "dvc", "repro", *arguments], env=dvc_environment(), check=False
    ).returncode
    if status:
        raise CarvanaError("dvc repro failed; see the message above. Finished stages are kept.")
    return not any(argument == "--dry" or not argument.startswith("-") for argument in arguments)


def check_nets(params: Params) -> None:
    """Raise CarvanaError if an encoder does not exist, lacks its weights file or can't process the input.

    So users need not wait for the data to learn of it. The stage ``train`` checks more, as it knows the images.
    """
    for model in params.models.active:
        resolved = params.resolve_model(model)
        spec, input, settings = resolved.spec, resolved.input, resolved.train
        if isinstance(spec, EncoderConfig):
            from pipeline.models.networks import check_sizes  # imported here because it takes seconds

            local_encoder_weights(spec.encoder, spec.encoder_weights)
            full = input.height, input.width
            check_sizes(
                spec, input, {"training": (settings.batch_size, *(settings.crop or full))}, {"validation": full}
            )


def provide_data(settings: DataSettings, root: Path, *, thorough: bool = False) -> CompetitionData:
    """Return the competition's files. Missing ones are downloaded or drawn, if ``data.source`` says so.

    ``thorough`` verifies the checksum of every downloaded file; otherwise its size and time are enough. Raises
    CarvanaError if files cannot be downloaded, or if the folder of the data does not exist.
    """
    if settings.is_from_kaggle:
        from pipeline.kaggle.commands import download_competition  # imported here because it takes 0.3 s

        download_competition(settings, root, thorough=thorough)
    return ensure_data(settings, root)


def dvc_environment() -> dict[str, str]:
    """Return the environment variables for DVC.

    ``PATH`` starts with the folder of this interpreter, because DVC's stages call ``carvana``. A user without a name,
    as in many containers, gets one, because DVC needs it.
    """
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    try:
        getpass.getuser()
    except (KeyError, OSError):
        environment["LOGNAME"] = str(os.getuid())
    return environment


def check_outputs(project: Path) -> None:
    """Raise CarvanaError for an output that DVC would refuse after the work: a symbolic link, or a file in Git."""
    outs = [out for stage in dvc_stages(project).values() for out in stage.get("outs", ())]
    cached = {str(out).partition("/${")[0] for out in outs if not isinstance(out, dict)}
    for out in sorted({part for name in cached for part in (name, *map(str, Path(name).parents)) if part != "."}):
        if (project / out).is_symlink():
            raise CarvanaError(
                f"{out} is a symbolic link, where DVC stores no results. To use a larger disk, move the whole project "
                f"there, or remove the link and mount the disk at {out}."
            )
    tracked = subprocess.run(
        ["git", "ls-files", "--", *sorted(out for out in cached if (project / out).is_file())],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
    )
    for name in tracked.stdout.splitlines() if tracked.returncode == 0 else ():
        if name in cached:
            raise CarvanaError(f"{name} is tracked by Git, but DVC writes it. Run 'git rm --cached {name}'.")


def check_dvc_lock(project: Path) -> None:
    """Raise CarvanaError if dvc.lock or DVC's rwlock is incomplete, or dvc.lock has a merge conflict."""
    lock = project / "dvc.lock"
    if lock.is_file() and _is_incomplete(lock):
        raise CarvanaError(
            f"{lock} is incomplete; probably a run was killed while DVC wrote it. Restore the last complete one "
            "with 'git checkout dvc.lock', or delete it. Finished stages are not run again."
        )
    rwlock = project / ".dvc" / "tmp" / "rwlock"
    if rwlock.is_file():
        try:
            json.loads(rwlock.read_text(encoding="utf-8") or "{}")
        except ValueError as error:
            raise CarvanaError(f"{rwlock} is incomplete. If no other dvc runs in this project, delete it.") from error


def _is_incomplete(lock: Path) -> bool:
    """Return whether dvc.lock was cut off; DVC itself accepts a file that ends between two entries."""
    try:
        text = read_versioned(lock)
        entries = [
            entry
            for stage in YAML(typ="safe").load(text)["stages"].values()
            for entry in (*stage.get("deps", ()), *stage.get("outs", ()), *stage.get("params", {}).values())
        ]
    except (YAMLError, UnicodeDecodeError, AttributeError, KeyError, TypeError):
        return True
    return not text.endswith("\n") or not all(isinstance(entry, dict) for entry in entries)
