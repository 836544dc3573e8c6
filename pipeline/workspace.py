"""Where the project's files are, and functions that open them: data, folds, nets, predictions."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.config import Params, read_params
from pipeline.data.competition_data import CompetitionData, ImageSet, LabeledImages, data_dir, open_test, open_training
from pipeline.data.fold_assignment import read_folds
from pipeline.errors import CarvanaError
from pipeline.utils.files import sha256_of

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


MANIFEST_FILE = Path("data/manifest.json")
REPORTS_DIR = Path("reports")
TRUTH_FILE = Path("data/truth.csv")
FOLDS_FILE = Path("folds/folds.csv")


def read_manifest() -> dict[str, Any]:
    """Return the manifest; raises CarvanaError if there is none yet."""
    try:
        manifest: dict[str, Any] = json.loads(MANIFEST_FILE.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CarvanaError(f"{MANIFEST_FILE} can't be read ({error}): run 'dvc repro download'.") from error
    return manifest


def read_json(path: Path, remedy: str = "run 'dvc repro', which makes it") -> dict[str, Any]:
    """Return what an earlier stage wrote; raises CarvanaError, which ends with ``remedy``, if it is not there."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CarvanaError(f"{path} can't be read ({error}): {remedy}.") from error
    return content


def competition_files(params: Params) -> CompetitionData:
    """Return the competition's files; raises CarvanaError if those drawn or fetched were deleted."""
    folder = data_dir(params.data, project_root())
    if params.data.directory is None and not folder.is_dir():
        raise CarvanaError(f"{folder} is gone: bring the data in again with 'dvc repro --force download'.")
    return CompetitionData(folder, params.data.quality == "hq")


def training_images(params: Params) -> LabeledImages:
    """Return the training images and masks; where they lie is no part of any result."""
    return open_training(competition_files(params), read_manifest())


def test_images(params: Params) -> ImageSet:
    """Return the test images."""
    return open_test(competition_files(params), read_manifest())


def truth_path() -> Path | None:
    """Return the CSV of true test masks, or None where it holds none."""
    with TRUTH_FILE.open(encoding="utf-8") as lines:
        return TRUTH_FILE if sum(1 for _ in islice(lines, 2)) > 1 else None


def expected_ids() -> list[str]:
    """Return the ids that a submission must hold; raises CarvanaError where the data are not available."""
    source = competition_files(read_params())
    return source.sample_ids or source.test.ids()


def read_fold_by_car() -> dict[str, int]:
    """Return the fold of every car."""
    return read_folds(FOLDS_FILE)


def net_dir(model: str, fold: int) -> Path:
    """Return where a trained net lies."""
    return Path("folds") / model / str(fold)


def predictions_dir(split: str, model: str, fold: int) -> Path:
    """Return where a net's maps of a split lie."""
    return Path("predictions") / split / model / str(fold)


def code_digest(stage: str, root: Path = Path(__file__).parents[1]) -> str:
    """Return a digest of the code that decides a stage's result: the parts of ``pipeline/`` among its deps.

    Those are the ones that DVC hashes, read from dvc.yaml beside the code that runs.
    """
    deps = YAML(typ="safe").load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"][stage]["deps"]
    code = [root / dep for dep in deps if dep.startswith("pipeline/")]
    files = [file for path in code for file in ([path] if path.is_file() else path.rglob("*"))]
    wanted = sorted(file for file in files if file.suffix in (".py", ".j2"))
    return sha256_of(*(part for file in wanted for part in (str(file.relative_to(root)).encode(), file.read_bytes())))


def net_digest(folder: Path, weights: str) -> str:
    """Return the digest of a trained net's folder, with the ``weights`` (``last`` or ``best``) that predict.

    An index of maps holds it as ``net``. Raises CarvanaError if the folder holds no such net.
    """
    try:
        return sha256_of(*((folder / name).read_bytes() for name in (CONFIG, WEIGHTS[weights])))
    except OSError as error:
        raise CarvanaError(f"{folder} holds no trained net ({error}): train it with 'dvc repro train'.") from error


CONFIG = "config.json"
WEIGHTS = {"last": "model.safetensors", "best": "best.safetensors"}
"""Files of a trained net's folder, as the Hugging Face hub lays them out."""
