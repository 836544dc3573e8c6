"""Compare an export with PyTorch (probabilities, Dice) and measure its speed."""

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, median
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.competition.dice import confusion_counts
from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.config import InputSettings, MergeName
from pipeline.ensemble.merge import MergeRule
from pipeline.errors import CarvanaError
from pipeline.export.writers import write_onnx
from pipeline.inference.onnx_predictor import OnnxMetadata
from pipeline.inference.probability_map import MAX_LEVEL, ProbabilityMap, sum_views
from pipeline.inference.torch_predictor import TorchPredictor
from pipeline.models.networks import SegmentationModel
from pipeline.models.resize import clamped_sigmoid, to_network_input, upsample_logits
from pipeline.models.tta import TTATransform
from pipeline.utils.arrays import BoolArray, Float32Array, UInt8Array
from pipeline.utils.parallel import available_cpus
from pipeline.workspace import WEIGHTS

MAX_DIFFERENCE = 1e-3
"""Largest difference in probability, at full size, that is accepted for floating-point formats."""

MAX_DICE_DROP = 0.003
"""Largest difference in mean Dice, in either direction, that is accepted for all formats."""

CHECK_IMAGES = 16
"""Number of images that exports are verified on."""


@dataclass(frozen=True)
class LoadedExport:
    """An export, loaded and ready to run."""

    run: Callable[[UInt8Array], NDArray[np.float32]]
    """Returns the file's output for a preprocessed image (h, w, C): logits (h, w), or the probability at full size."""
    probability: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    """Converts the output of ``run`` to the probability (1280, 1918)."""


@dataclass(frozen=True)
class ReferencePrediction:
    """PyTorch's prediction for an image."""

    input: UInt8Array
    """Preprocessed image (h, w, C)."""
    probability_HW: NDArray[np.float32]
    true_HW: BoolArray
    dice: float
    """Dice of PyTorch's mask."""
    ambiguous_HW: BoolArray | None = None
    """Where rounding may change a majority vote; not compared."""


@dataclass(frozen=True)
class ExportReport:
    """How an export compares with PyTorch."""

    bytes: int
    difference: float
    """Largest difference in probability, at full size, over all images and pixels."""
    dice: float
    """Mean over the images, at full size."""
    dice_drop: float
    """PyTorch's mean Dice minus ``dice``."""
    images: int
    images_per_second: float
    """With batch size 1, after warm-up, without pre- and post-processing."""
    machine: str


def benchmark_export(
    path: Path, exported: LoadedExport, references: Sequence[ReferencePrediction], threshold: float
) -> ExportReport:
    """Run an export on all reference images and compare; pixels with at least ``threshold`` are foreground."""
    differences, dices, seconds = [], [], []
    exported.run(references[0].input)  # warm-up
    for reference in references:
        start = time.perf_counter()
        output = exported.run(reference.input)
        seconds.append(time.perf_counter() - start)
        probability_HW = exported.probability(output)
        differences.append(_max_difference(probability_HW, reference))
        dices.append(confusion_counts(probability_HW >= threshold, reference.true_HW).dice)
    return ExportReport(
        bytes=size_of(path),
        difference=max(differences),
        dice=mean(dices),
        dice_drop=mean(reference.dice for reference in references) - mean(dices),
        images=len(references),
        images_per_second=1 / median(seconds),
        machine=machine_name(),
    )


def assert_close(name: str, report: ExportReport, *, exact: bool) -> None:
    """Raise CarvanaError if an export differs too much from PyTorch; ``exact``: it computes in floating point."""
    if exact and not report.difference < MAX_DIFFERENCE:
        raise CarvanaError(
            f"{name} was not kept: probabilities differ from PyTorch by up to {report.difference:.2g} on "
            f"{report.images} images (limit {MAX_DIFFERENCE:g}). Try another version of torch or onnxruntime."
        )
    if not abs(report.dice_drop) <= MAX_DICE_DROP:
        raise CarvanaError(
            f"{name} was not kept: Dice differs from PyTorch by {-report.dice_drop:+.4f} on {report.images} images "
            f"(limit {MAX_DICE_DROP:g})."
            + ("" if exact else " Calibrate on more images (--images), or choose a floating-point format.")
        )


def full_size_probability(logits_hw: Float32Array) -> NDArray[np.float32]:
    """Return the probability (1280, 1918) of a net's logits (h, w)."""
    return clamped_sigmoid(upsample_logits(logits_hw, HEIGHT, WIDTH))


def _max_difference(probability_HW: NDArray[np.float32], reference: ReferencePrediction) -> float:
    difference_HW = np.nan_to_num(np.abs(probability_HW - reference.probability_HW), nan=1.0)
    if reference.ambiguous_HW is not None:
        difference_HW[reference.ambiguous_HW] = 0
    return float(difference_HW.max())


def size_of(path: Path) -> int:
    """Return the size in bytes of a file, or of all files in a folder."""
    files: Iterable[Path] = path.rglob("*") if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files)


def machine_name() -> str:
    """Return a description of this machine: cores, processor, operating system."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    name = next(iter(names), platform.processor() or platform.machine())
    number = available_cpus()
    return f"{number} core{'' if number == 1 else 's'} of {name}, {platform.system()}"


Probability = NDArray[np.float32]


class ExportImages(Protocol):
    """Source of images and masks, by image id."""

    def image(self, image_id: str) -> UInt8Array:
        """Return an image, uint8 RGB (1280, 1918, 3)."""

    def mask(self, image_id: str) -> UInt8Array:
        """Return a mask, uint8 of 0 and 1, (1280, 1918)."""


@dataclass(frozen=True)
class ExportJob:
    """A model to export, and the images for verification and calibration."""

    model: str
    fold: int
    """Fold of the net for single-net formats."""
    folders: Mapping[int, Path]
    """Folders of the trained nets by fold: ``fold`` and those of the ensemble."""
    digests: Mapping[int, str]
    """Digests of all trained nets of the model, by fold."""
    ensemble: Sequence[int]
    """Folds of the ensemble."""
    weights: str
    """Which checkpoint: ``last`` or ``best``."""
    views: Sequence[str]
    """TTA views of the ensemble."""
    merge: MergeName
    threshold: float
    reader: ExportImages
    check_ids: Sequence[str]
    """Images to verify exports on."""
    calibration: Sequence[str]
    """Training images of ``fold``, for int8 calibration."""


class ExportContext:
    """The nets of a job, their ONNX files in ``folder``, and PyTorch's predictions for comparison.

    Raises CarvanaError if nets are missing or their input settings differ.
    """

    def __init__(self, job: ExportJob, folder: Path) -> None:
        self.job = job
        self._folder = folder
        self._predictors = {
            fold: TorchPredictor(path, views=job.views, weights=job.weights, device="cpu", precision="32")
            for fold, path in job.folders.items()
        }
        for fold, predictor in self._predictors.items():
            if predictor.input != self.input:
                raise CarvanaError(
                    f"The nets of {job.model} for folds {job.fold} and {fold} have different input settings. Train "
                    "them with the same settings, or choose single-net formats with --format."
                )

    @property
    def net(self) -> SegmentationModel:
        """The net for single-net formats, on the CPU."""
        return self._predictors[self.job.fold].net

    @property
    def input(self) -> InputSettings:
        """Input settings of the nets."""
        return self._predictors[self.job.fold].input

    @property
    def weights(self) -> Path:
        """File with the weights of ``net``."""
        return self.job.folders[self.job.fold] / WEIGHTS[self.job.weights]

    def metadata(self, fold: int | None = None) -> OnnxMetadata:
        """Return the ONNX metadata of one fold's net, or of the ensemble."""
        job = self.job
        if fold is not None:
            return OnnxMetadata(kind="net", model=job.model, folds=(fold,), input=self.input)
        return OnnxMetadata(
            kind="ensemble",
            model=job.model,
            folds=tuple(job.ensemble),
            input=self.input,
            views=tuple(job.views),
            merge=job.merge,
            threshold=job.threshold,
        )

    def onnx(self, fold: int) -> Path:
        """Return the ONNX file of a fold's net, written on first use."""
        path = self._folder / f"fold-{fold}.onnx"
        if not path.exists():
            write_onnx(self._predictors[fold].net, self.metadata(fold), path)
        return path

    def calibration(self) -> Iterator[UInt8Array]:
        """Yield the preprocessed calibration images."""
        return (to_network_input(self.job.reader.image(image_id), self.input) for image_id in self.job.calibration)

    @cached_property
    def net_references(self) -> list[ReferencePrediction]:
        """Predictions of the single net."""
        return [self._net_reference(image_id) for image_id in self.job.check_ids]

    @cached_property
    def ensemble_references(self) -> list[ReferencePrediction]:
        """Predictions of the ensemble."""
        return [self._ensemble_reference(image_id) for image_id in self.job.check_ids]

    def _net_reference(self, image_id: str) -> ReferencePrediction:
        pixels_hwC, true_HW = self._image(image_id)
        probability_HW = self._predict(self.job.fold, TTATransform(), pixels_hwC)
        dice = confusion_counts(probability_HW >= 0.5, true_HW).dice
        return ReferencePrediction(pixels_hwC, probability_HW, true_HW, dice)

    def _ensemble_reference(self, image_id: str) -> ReferencePrediction:
        """Return the Dice of the submission's mask, from quantized maps, and the unquantized probability."""
        pixels_hwC, true_HW = self._image(image_id)
        job, maps, means = self.job, list[ProbabilityMap](), list[Probability]()
        for fold in job.ensemble:
            probs_VHW = self._predictors[fold].predict_u8([pixels_hwC], HEIGHT, WIDTH)[0]
            maps.append(sum_views(image_id, "+".join(job.views), probs_VHW))
            means.append(_mean([self._predict(fold, TTATransform.parse(name), pixels_hwC) for name in job.views]))
        merge = MergeRule(job.merge, job.threshold, (len(job.views),) * len(maps), (1,) * len(maps))
        dice = confusion_counts(merge.mask(maps), true_HW).dice
        return ReferencePrediction(pixels_hwC, self._merged(means), true_HW, dice, self._ambiguous(means))

    def _merged(self, means: Sequence[Probability]) -> Probability:
        job = self.job
        if job.merge == "majority_vote":
            return _mean([np.asarray(mean >= job.threshold, np.float32) for mean in means])
        if job.merge == "mean_logit" and len(means) > 1:
            least = 0.5 / (MAX_LEVEL * len(job.views))
            clipped = [np.clip(mean, least, 1 - least, dtype=np.float64) for mean in means]
            logits = np.mean([np.log(p / (1 - p)) for p in clipped], axis=0)
            return np.asarray(1 / (1 + np.exp(-logits)), np.float32)
        return _mean(means)

    def _ambiguous(self, means: Sequence[Probability]) -> BoolArray | None:
        if self.job.merge != "majority_vote":
            return None
        near = [np.abs(mean - self.job.threshold) < MAX_DIFFERENCE for mean in means]
        return np.asarray(np.any(near, axis=0))

    @torch.inference_mode()
    def _predict(self, fold: int, view: TTATransform, pixels_hwC: UInt8Array) -> Probability:
        """Return the unquantized probability (1280, 1918) of a net on one view."""
        pixels = torch.from_numpy(pixels_hwC).permute(2, 0, 1)[None].float()
        return full_size_probability(view.deaugment(self._predictors[fold].net(view.augment(pixels)))[0, 0].numpy())

    def _image(self, image_id: str) -> tuple[UInt8Array, BoolArray]:
        reader = self.job.reader
        return to_network_input(reader.image(image_id), self.input), reader.mask(image_id) > 0


def _mean(probabilities: Sequence[Probability]) -> Probability:
    return np.asarray(np.mean(probabilities, axis=0, dtype=np.float32), np.float32)
