"""Segment images of any size with trained nets or exports.

Prediction and merging are separate steps, so that the app can change settings without running nets again. Merging and
post-processing are the same as for submissions, to the pixel.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.config import Device, EnsembleSettings, InputSettings, Precision
from pipeline.ensemble.evaluation import disagreement_map, uncertainty_map
from pipeline.ensemble.merge import MergeRule
from pipeline.ensemble.postprocess import MaskBuilder
from pipeline.errors import CarvanaError
from pipeline.inference.base_predictor import BUILTIN_TTA, BasePredictor
from pipeline.inference.probability_map import ProbabilityMap, sum_maps
from pipeline.utils.arrays import UInt8Array

FOLDS_DIR, EXPORTS_DIR = "folds", "exports"

_CONFIG = "config.json"


def list_models(project: Path) -> list[str]:
    """Return the names of all nets and exports of a project, such as ``small/0`` and ``exports/small/model.onnx``."""
    models = sorted(path for path in (project / FOLDS_DIR).glob("[!.]*") if path.is_dir())
    nets = [f"{model.name}/{fold}" for model in models for fold in _folds_in(model)]
    # Hidden folders hold exports that are not verified yet.
    exports = sorted((project / EXPORTS_DIR).glob("[!.]*/[!.]*.onnx"))
    return nets + [path.relative_to(project).as_posix() for path in exports]


def resolve(name: str, project: Path = Path()) -> list[str]:
    """Return the nets that a name stands for: a single net or export, or all folds of a model.

    Raises CarvanaError, listing the known names, if there are none.
    """
    if _locate(name, project):
        return [_relative_name(name)]
    for folder in (project / FOLDS_DIR / name, project / name):
        folds = _folds_in(folder)
        if folds:
            return [f"{_relative_name(name)}/{fold}" for fold in folds]
    raise _unknown_net(name, project)


def load_predictor(
    name: str,
    views: Sequence[str],
    *,
    weights: Literal["last", "best"] = "last",
    device: Device = "auto",
    precision: Precision = "auto",
    project: Path = Path(),
) -> BasePredictor:
    """Return a predictor for a name from `list_models`, the folder of a trained net, or an ONNX file.

    Exports use only ``views``. Raises CarvanaError if there is no such net, or if onnxruntime is needed and missing.
    """
    path = _locate(name, project)
    if path is None:
        raise _unknown_net(name, project)
    if path.is_file():
        from pipeline.inference.onnx_predictor import OnnxPredictor

        return OnnxPredictor(path, views=views)
    from pipeline.inference.torch_predictor import TorchPredictor

    return TorchPredictor(path, views=views, weights=weights, device=device, precision=precision)


def default_threshold(nets: Iterable[BasePredictor]) -> float | None:
    """Return the threshold built into an ensemble export, if that is the only net, else None.

    The output of a majority-vote export is a share of nets, for which no other threshold is right.
    """
    predictors = list(nets)
    return predictors[0].default_threshold if len(predictors) == 1 else None


def model_of(name: str) -> str:
    """Return the model of a net's name: ``small`` of ``small/0``."""
    return name.rpartition("/")[0]


def _locate(name: str, project: Path) -> Path | None:
    """Return the net's folder or ONNX file of a name, or None."""
    candidates = (project / FOLDS_DIR / name, project / name)
    return next((p for p in candidates if (p / _CONFIG).is_file() or (p.suffix == ".onnx" and p.is_file())), None)


def _folds_in(model: Path) -> list[str]:
    """Return the names of a model's trained folds, in numeric order."""
    folds = [path.parent.name for path in model.glob(f"[!.]*/{_CONFIG}")]
    return sorted(folds, key=lambda fold: (len(fold), fold))


def _relative_name(name: str) -> str:
    """Return ``small/0`` for ``folds/small/0/``, so that both spellings find the model's weight in the settings."""
    return Path(name).as_posix().removeprefix(f"{FOLDS_DIR}/")


def _unknown_net(name: str, project: Path) -> CarvanaError:
    known = list_models(project)
    if not known:
        return CarvanaError(f"Unknown net '{name}': nothing is trained yet. Run 'carvana repro' first.")
    return CarvanaError(f"Unknown net '{name}'. Use one of {', '.join(known)}, a net's folder or an .onnx file.")


@dataclass(frozen=True)
class ModelInputs:
    """An image with the preprocessed input of each net."""

    image_HWC: UInt8Array
    inputs: Mapping[str, UInt8Array]
    """By net, uint8 (h, w, C)."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Time by step."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.image_HWC.shape[0], self.image_HWC.shape[1]


@dataclass(frozen=True)
class RawPredictions:
    """An image with each net's probability map per view, before merging."""

    image_HWC: UInt8Array
    maps: Mapping[str, Mapping[str, ProbabilityMap]]
    """By net, then by view."""
    seconds: Mapping[str, float]
    """Time by step: ``prepare``, then each net by name."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.image_HWC.shape[0], self.image_HWC.shape[1]


@dataclass(frozen=True)
class SegmentationResult:
    """A mask with its probability and disagreement maps, all (H, W) of the image."""

    mask_HW: NDArray[np.bool_]
    probability_HW: NDArray[np.uint8]
    """Weighted mean probability, whatever the merge rule, scaled to 0..255."""
    disagreement_HW: NDArray[np.uint8]
    """0 where all nets agree, 255 where they split evenly; with a single net, its uncertainty."""
    seconds: Mapping[str, float]
    """Time by step: ``prepare``, each net by name, ``merge``."""


class Segmenter:
    """Runs nets on images and merges their predictions. Nets are given by name, such as ``small/0``."""

    def __init__(self, nets: Mapping[str, BasePredictor]) -> None:
        self.nets = nets
        self.maps_per_image = sum(len(net.views) for net in nets.values())
        """Probability maps per image (one per net and view), each one byte per pixel."""

    def predict(self, image_HWC: UInt8Array) -> RawPredictions:
        """Run every net on an image, uint8 RGB (H, W, 3) of any size."""
        return self.predict_batch([self.prepare(image_HWC)])[0]

    def prepare(self, image_HWC: UInt8Array) -> ModelInputs:
        """Return the inputs for `predict_batch`; thread-safe."""
        start = time.perf_counter()
        by_input: dict[InputSettings, UInt8Array] = {}  # shared by nets with the same input settings
        for net in self.nets.values():
            if net.input not in by_input:
                by_input[net.input] = net.preprocess(_at_most_native(image_HWC, net.input))
        inputs = {name: by_input[net.input] for name, net in self.nets.items()}
        return ModelInputs(image_HWC, inputs, {"prepare": time.perf_counter() - start})

    def predict_batch(self, images: Sequence[ModelInputs]) -> list[RawPredictions]:
        """Run every net on images of any sizes; those whose inputs have the same shape form one batch."""
        maps: list[dict[str, Mapping[str, ProbabilityMap]]] = [{} for _ in images]
        seconds = [dict(image.seconds) for image in images]
        for name, net in self.nets.items():
            for group in _group_by_shape([image.inputs[name] for image in images]):
                start = time.perf_counter()
                probs = net.predict_u8_at_sizes(
                    [images[i].inputs[name] for i in group], [images[i].size for i in group]
                )
                seconds_per_image = (time.perf_counter() - start) / len(group)
                for i, probs_VHW in zip(group, probs, strict=True):
                    maps[i][name] = {
                        view: ProbabilityMap.crop(name, view, 1, probs_HW)
                        for view, probs_HW in zip(net.views, probs_VHW, strict=True)
                    }
                    seconds[i][name] = seconds_per_image
        return [RawPredictions(i.image_HWC, m, s) for i, m, s in zip(images, maps, seconds, strict=True)]

    def segment(
        self,
        predictions: RawPredictions,
        settings: EnsembleSettings,
        nets: Sequence[str] | None = None,
        views: Sequence[str] | None = None,
    ) -> NDArray[np.bool_]:
        """Return the mask (H, W) merged from some nets and views (None: all) with ``settings``, without running nets.

        Raises CarvanaError if no net or view is selected.
        """
        maps, merge = _merge(predictions, settings, _selected_nets(predictions, nets), views)
        return _mask(predictions, maps, merge, settings)

    def combine(
        self,
        predictions: RawPredictions,
        settings: EnsembleSettings,
        nets: Sequence[str] | None = None,
        views: Sequence[str] | None = None,
    ) -> SegmentationResult:
        """Return the mask of `segment` with probability and disagreement maps and times."""
        start = time.perf_counter()
        names = _selected_nets(predictions, nets)
        maps, merge = _merge(predictions, settings, names, views)
        mask_HW = _mask(predictions, maps, merge, settings)
        merge_seconds = time.perf_counter() - start
        return SegmentationResult(
            mask_HW,
            replace(merge, name="mean_probability").probs_u8(maps, *predictions.size),
            _disagreement(maps, merge, *predictions.size),
            {step: predictions.seconds[step] for step in ("prepare", *names)} | {"merge": merge_seconds},
        )


def _selected_nets(predictions: RawPredictions, nets: Sequence[str] | None) -> Sequence[str]:
    names = list(predictions.maps) if nets is None else nets
    if not names:
        raise CarvanaError("No net is selected. Select at least one.")
    return names


def _merge(
    predictions: RawPredictions, settings: EnsembleSettings, names: Sequence[str], views: Sequence[str] | None
) -> tuple[list[ProbabilityMap], MergeRule]:
    """Return the map of each net, summed over views, and the rule that merges them."""
    maps = [_sum_views(predictions.maps[name], views) for name in names]
    weights = tuple(settings.weights.get(model_of(name), 1) for name in names)
    return maps, MergeRule(settings.merge, settings.threshold, tuple(m.count for m in maps), weights)


def _mask(
    predictions: RawPredictions, maps: Sequence[ProbabilityMap], merge: MergeRule, settings: EnsembleSettings
) -> NDArray[np.bool_]:
    mask_builder = MaskBuilder(merge, settings.postprocess, lambda _: predictions.image_HWC)
    return mask_builder.mask(maps, *predictions.size)


def _at_most_native(image_HWC: UInt8Array, input: InputSettings) -> UInt8Array:
    """Return an image, shrunk to the competition's number of pixels if it is larger and the net takes native size.

    Such nets know only cars of that size, and their memory use would be unbounded.
    """
    height, width = image_HWC.shape[:2]
    factor = math.sqrt(HEIGHT * WIDTH / (height * width))
    if input.size != "native" or factor >= 1:
        return image_HWC
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return np.asarray(cv2.resize(image_HWC, size, interpolation=cv2.INTER_AREA), np.uint8)


def _group_by_shape(inputs: Sequence[UInt8Array]) -> list[list[int]]:
    """Return the indices of the inputs, grouped by shape."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, pixels in enumerate(inputs):
        groups[pixels.shape].append(index)
    return list(groups.values())


def _sum_views(maps: Mapping[str, ProbabilityMap], views: Sequence[str] | None) -> ProbabilityMap:
    """Return the sum over the selected views; ensemble exports always use their built-in views."""
    chosen = [m for view, m in maps.items() if views is None or view in views or view == BUILTIN_TTA]
    if not chosen:
        raise CarvanaError(f"No view is selected. Select from {', '.join(maps)}.")
    return sum_maps(chosen)


def _disagreement(maps: Sequence[ProbabilityMap], merge: MergeRule, height: int, width: int) -> NDArray[np.uint8]:
    if len(maps) == 1:
        return uncertainty_map(maps[0], height, width)
    return disagreement_map([replace(merge, counts=(m.count,), weights=(1,)).mask([m], height, width) for m in maps])
