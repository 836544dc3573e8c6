"""Trained nets and exports by name. torch is imported only where a trained net is loaded: exports do without."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from pipeline.errors import CarvanaError
from pipeline.learning.settings import Device, Precision
from pipeline.learning.speaker import BasePredictor

FOLDS_DIR, EXPORTS_DIR = "folds", "exports"

_CONFIG = "config.json"


def list_models(project: Path) -> list[str]:
    """Return the names of all nets and exports of a project: ``small/0``, ``exports/small/model.onnx``."""
    models = sorted(path for path in (project / FOLDS_DIR).glob("[!.]*") if path.is_dir())
    nets = [f"{model.name}/{fold}" for model in models for fold in _folds_in(model)]
    # None in a hidden folder: those are being made, and not proven yet.
    exports = sorted((project / EXPORTS_DIR).glob("[!.]*/[!.]*.onnx"))
    return nets + [path.relative_to(project).as_posix() for path in exports]


def resolve(name: str, project: Path = Path()) -> list[str]:
    """Return the names of the nets that a name stands for: a net's own, or, of a model or its folder, all its folds.

    Raises CarvanaError that says which there are if it stands for none.
    """
    if _locate(name, project):
        return [_relative_name(name)]
    for folder in (project / FOLDS_DIR / name, project / name):
        folds = _folds_in(folder)
        if folds:
            return [f"{_relative_name(name)}/{fold}" for fold in folds]
    raise _unknown(name, project)


def load_predictor(
    name: str,
    views: Sequence[str],
    *,
    weights: Literal["last", "best"] = "last",
    device: Device = "auto",
    precision: Precision = "auto",
    project: Path = Path(),
) -> BasePredictor:
    """Return the net of a name that ``trained`` tells, of a trained net's folder, or of an ONNX file.

    To an export only ``views`` matters. Raises CarvanaError if there is none, or if what runs it is not installed.
    """
    path = _locate(name, project)
    if path is None:
        raise _unknown(name, project)
    if path.is_file():
        from pipeline.exporting.runtime import OnnxPredictor

        return OnnxPredictor(path, views=views)
    from pipeline.learning.inference import TorchPredictor

    return TorchPredictor(path, views=views, weights=weights, device=device, precision=precision)


def default_threshold(nets: Iterable[BasePredictor]) -> float | None:
    """Return where an export of an ensemble cuts its own probabilities, if it is the only net; those of a vote are
    shares of nets, which other settings don't fit."""
    alone = list(nets)
    return alone[0].default_threshold if len(alone) == 1 else None


def model_of(name: str) -> str:
    """Return the model of a net's name: ``small`` of ``small/0``."""
    return name.rpartition("/")[0]


def _locate(name: str, project: Path) -> Path | None:
    """Return the folder or the ONNX file that a name stands for."""
    candidates = (project / FOLDS_DIR / name, project / name)
    return next((p for p in candidates if (p / _CONFIG).is_file() or (p.suffix == ".onnx" and p.is_file())), None)


def _folds_in(model: Path) -> list[str]:
    """Return the folds of a model's folder that hold a net, 10 after 9."""
    folds = [path.parent.name for path in model.glob(f"[!.]*/{_CONFIG}")]
    return sorted(folds, key=lambda fold: (len(fold), fold))


def _relative_name(name: str) -> str:
    """Return ``small/0`` of ``folds/small/0/``, so that the model's weight is known by either."""
    return Path(name).as_posix().removeprefix(f"{FOLDS_DIR}/")


def _unknown(name: str, project: Path) -> CarvanaError:
    known = list_models(project)
    if not known:
        return CarvanaError(f"There is no net '{name}', nor any other so far: train some with 'carvana repro'.")
    return CarvanaError(f"There is no net '{name}': name one of {', '.join(known)}, a net's folder or an .onnx file.")
