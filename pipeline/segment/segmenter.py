"""From a picture to its mask: what nets say of it, and, apart from that, what is made of what they say.

Merging and post-processing are those of submissions, to the pixel.
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
from pipeline.ensemble.disagreement import disagreement_map, uncertainty_map
from pipeline.ensemble.merge import MergeRule
from pipeline.ensemble.postprocess import MaskBuilder
from pipeline.errors import CarvanaError
from pipeline.inference.base_predictor import BUILTIN_TTA, BasePredictor
from pipeline.inference.probability_map import ProbabilityMap, sum_maps
from pipeline.utils.arrays import UInt8Array

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
        from pipeline.inference.onnx_predictor import OnnxPredictor

        return OnnxPredictor(path, views=views)
    from pipeline.inference.torch_predictor import TorchPredictor

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


Settings = EnsembleSettings
"""Merge, threshold, weights by model, and steps; its ``models`` and ``folds`` are for whoever loads the nets."""


@dataclass(frozen=True)
class ModelInputs:
    """A picture with what each net sees of it."""

    image_HWC: UInt8Array
    inputs: Mapping[str, UInt8Array]
    """By net, (h, w, C)."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By stage."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the picture."""
        return self.image_HWC.shape[0], self.image_HWC.shape[1]


@dataclass(frozen=True)
class RawPredictions:
    """A picture with what each net says of it; views are kept apart, so that they can be chosen afterwards."""

    image_HWC: UInt8Array
    maps: Mapping[str, Mapping[str, ProbabilityMap]]
    """By net, then by view."""
    seconds: Mapping[str, float]
    """By stage: ``prepare``, then each net by its name."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the picture."""
        return self.image_HWC.shape[0], self.image_HWC.shape[1]


@dataclass(frozen=True)
class SegmentationResult:
    """A picture's mask, and what people may want to see of how it came; all rasters (H, W) of the picture."""

    mask_HW: NDArray[np.bool_]
    probability_HW: NDArray[np.uint8]
    """Weighted mean of the nets' probabilities, whatever the merge: 0 to 255."""
    disagreement_HW: NDArray[np.uint8]
    """0 where all nets say the same, 255 where half say otherwise; of a single net how near it is to undecided."""
    seconds: Mapping[str, float]
    """By stage: ``prepare``, each net that was asked by its name, ``decide``."""


class Segmenter:
    """Nets that look at pictures together, by name; a name such as ``small/0`` tells the model that weights are by."""

    def __init__(self, nets: Mapping[str, BasePredictor]) -> None:
        self.nets = nets
        self.rasters = sum(len(net.views) for net in nets.values())
        """How many rasters there are of each picture, one a net and view, of a byte a pixel."""

    def predict(self, image_HWC: UInt8Array) -> RawPredictions:
        """Run every net on a picture, uint8 RGB (H, W, 3) of any size."""
        return self.predict_image([self.prepare(image_HWC)])[0]

    def prepare(self, image_HWC: UInt8Array) -> ModelInputs:
        """Return a picture as ``look_at`` wants it; several threads may call at once."""
        begun = time.perf_counter()
        seen: dict[InputSettings, UInt8Array] = {}  # nets that want the same share it
        for net in self.nets.values():
            if net.input not in seen:
                seen[net.input] = net.preprocess(_at_most_native(image_HWC, net.input))
        inputs = {name: seen[net.input] for name, net in self.nets.items()}
        return ModelInputs(image_HWC, inputs, {"prepare": time.perf_counter() - begun})

    def predict_image(self, pictures: Sequence[ModelInputs]) -> list[RawPredictions]:
        """Run every net on pictures of any sizes, together where what it sees of them has one size."""
        maps: list[dict[str, Mapping[str, ProbabilityMap]]] = [{} for _ in pictures]
        seconds = [dict(picture.seconds) for picture in pictures]
        for name, net in self.nets.items():
            for group in _of_one_shape([picture.inputs[name] for picture in pictures]):
                begun = time.perf_counter()
                levels = net.predict_u8_at_sizes(
                    [pictures[i].inputs[name] for i in group], [pictures[i].size for i in group]
                )
                took = (time.perf_counter() - begun) / len(group)
                for i, levels_VHW in zip(group, levels, strict=True):
                    maps[i][name] = {
                        view: ProbabilityMap.crop(name, view, 1, levels_HW)
                        for view, levels_HW in zip(net.views, levels_VHW, strict=True)
                    }
                    seconds[i][name] = took
        return [RawPredictions(p.image_HWC, m, s) for p, m, s in zip(pictures, maps, seconds, strict=True)]

    def segment(
        self,
        looked: RawPredictions,
        settings: Settings,
        nets: Sequence[str] | None = None,
        views: Sequence[str] | None = None,
    ) -> NDArray[np.bool_]:
        """Return the mask (H, W) that some nets and views, None for all, give under ``settings``. No net runs.

        Raises CarvanaError if no net or view is left.
        """
        maps, merge = _merge(looked, settings, _names(looked, nets), views)
        return _decision(looked, merge, settings).mask(maps, *looked.size)

    def combine(
        self,
        looked: RawPredictions,
        settings: Settings,
        nets: Sequence[str] | None = None,
        views: Sequence[str] | None = None,
    ) -> SegmentationResult:
        """Return what ``mask`` does, with probability, disagreement and times."""
        begun = time.perf_counter()
        names = _names(looked, nets)
        maps, merge = _merge(looked, settings, names, views)
        mask_HW = _decision(looked, merge, settings).mask(maps, *looked.size)
        took = time.perf_counter() - begun
        return SegmentationResult(
            mask_HW,
            replace(merge, name="mean_probability").levels(maps, *looked.size),
            _disagreement(maps, merge, *looked.size),
            {stage: looked.seconds[stage] for stage in ("prepare", *names)} | {"decide": took},
        )


def _names(looked: RawPredictions, nets: Sequence[str] | None) -> Sequence[str]:
    names = list(looked.maps) if nets is None else nets
    if not names:
        raise CarvanaError("No net is chosen: choose one at least.")
    return names


def _merge(
    looked: RawPredictions, settings: Settings, names: Sequence[str], views: Sequence[str] | None
) -> tuple[list[ProbabilityMap], MergeRule]:
    """Return the map of each net, summed over views, and how to merge them."""
    maps = [_sum(looked.maps[name], views) for name in names]
    weights = tuple(settings.weights.get(model_of(name), 1) for name in names)
    return maps, MergeRule(settings.merge, settings.threshold, tuple(m.count for m in maps), weights)


def _decision(looked: RawPredictions, merge: MergeRule, settings: Settings) -> MaskBuilder:
    return MaskBuilder(merge, settings.postprocess, lambda _: looked.image_HWC)


def _at_most_native(image_HWC: UInt8Array, input: InputSettings) -> UInt8Array:
    """Return a picture, shrunk to as many pixels as a photograph of the competition has if the net wants it as it is.

    Such a net knows cars of that size alone, and memory for its features would have no bound.
    """
    height, width = image_HWC.shape[:2]
    factor = math.sqrt(HEIGHT * WIDTH / (height * width))
    if input.size != "native" or factor >= 1:
        return image_HWC
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return np.asarray(cv2.resize(image_HWC, size, interpolation=cv2.INTER_AREA), np.uint8)


def _of_one_shape(inputs: Sequence[UInt8Array]) -> list[list[int]]:
    """Return the numbers of inputs, those of one shape together."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, pixels in enumerate(inputs):
        groups[pixels.shape].append(number)
    return list(groups.values())


def _sum(maps: Mapping[str, ProbabilityMap], views: Sequence[str] | None) -> ProbabilityMap:
    """Return the sum over views; an export of an ensemble looks in its own, whichever are chosen."""
    chosen = [m for view, m in maps.items() if views is None or view in views or view == BUILTIN_TTA]
    if not chosen:
        raise CarvanaError(f"None of the views is chosen: choose some of {', '.join(maps)}.")
    return sum_maps(chosen)


def _disagreement(maps: Sequence[ProbabilityMap], merge: MergeRule, height: int, width: int) -> NDArray[np.uint8]:
    if len(maps) == 1:
        return uncertainty_map(maps[0], height, width)
    return disagreement_map([replace(merge, counts=(m.count,), weights=(1,)).mask([m], height, width) for m in maps])
