"""Compare an export with the net it came from: probabilities, Dice, speed."""

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
"""In probability, of any pixel at full size: more than this, and a float format is refused."""

MAX_DICE_DROP = 0.003
"""Dice, at full size and on average: an export that is further from the net, either way, is refused."""

CHECK_IMAGES = 16
"""Images that exports are checked on."""


@dataclass(frozen=True)
class LoadedExport:
    """A file at work."""

    run: Callable[[UInt8Array], NDArray[np.float32]]
    """From a prepared picture (h, w, C) to what the file says: logits (h, w), or a probability at full size."""
    probability: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    """From what the file says to the probability (1280, 1918)."""


@dataclass(frozen=True)
class ReferencePrediction:
    """An image, and what PyTorch says of it."""

    input: UInt8Array
    """As the net sees it, (h, w, C)."""
    probability_HW: NDArray[np.float32]
    true_HW: BoolArray
    dice: float
    """Of PyTorch's mask."""
    ambiguous_HW: BoolArray | None = None
    """Where a rounding error may turn a vote, so that probabilities can't be compared."""


@dataclass(frozen=True)
class ExportReport:
    """How an export compares with PyTorch."""

    bytes: int
    difference: float
    """Greatest, in probability at full size, over all images and pixels."""
    dice: float
    """Mean over the images, at full size."""
    dice_drop: float
    """What PyTorch has more, on the same images."""
    images: int
    images_per_second: float
    """One image at a time, warm, the file's own work alone."""
    machine: str


def benchmark_export(
    path: Path, exported: LoadedExport, proofs: Sequence[ReferencePrediction], cut: float
) -> ExportReport:
    """Run an export on every image; ``cut`` is the probability from which on a pixel is car."""
    differences, dices, seconds = [], [], []
    exported.run(proofs[0].input)  # to be warm
    for proof in proofs:
        begun = time.perf_counter()
        said = exported.run(proof.input)
        seconds.append(time.perf_counter() - begun)
        said_HW = exported.probability(said)
        differences.append(_difference(said_HW, proof))
        dices.append(confusion_counts(said_HW >= cut, proof.true_HW).dice)
    return ExportReport(
        bytes=size_of(path),
        difference=max(differences),
        dice=mean(dices),
        dice_drop=mean(proof.dice for proof in proofs) - mean(dices),
        images=len(proofs),
        images_per_second=1 / median(seconds),
        machine=machine_name(),
    )


def assert_close(name: str, measured: ExportReport, *, exact: bool) -> None:
    """Raise CarvanaError if an export is too far from the net; ``exact`` where it computes in floats as that does."""
    on = f"on {measured.images} images"
    if exact and not measured.difference < MAX_DIFFERENCE:
        raise CarvanaError(
            f"{name} is not kept: {on}, its probability differs from PyTorch's by {measured.difference:.2g} at worst, "
            f"where {MAX_DIFFERENCE:g} is allowed. Another version of torch or onnxruntime may do better."
        )
    if not abs(measured.dice_drop) <= MAX_DICE_DROP:
        change = "loses" if measured.dice_drop > 0 else "gains, by chance,"
        raise CarvanaError(
            f"{name} is not kept: {on}, it {change} {abs(measured.dice_drop):.4f} of Dice against PyTorch, "
            f"where {MAX_DICE_DROP:g} is allowed."
            + ("" if exact else " Calibrate it on more photographs (--images), or take a float format.")
        )


def full_size_probability(logits_hw: Float32Array) -> NDArray[np.float32]:
    """Return the probability (1280, 1918) that a net's logits mean."""
    return clamped_sigmoid(upsample_logits(logits_hw, HEIGHT, WIDTH))


def _difference(said_HW: NDArray[np.float32], proof: ReferencePrediction) -> float:
    apart_HW = np.nan_to_num(np.abs(said_HW - proof.probability_HW), nan=1.0)  # no number is as far as can be
    if proof.ambiguous_HW is not None:
        apart_HW[proof.ambiguous_HW] = 0
    return float(apart_HW.max())


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    files: Iterable[Path] = path.rglob("*") if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files)


def machine_name() -> str:
    """Return words for the machine that runs this."""
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
    """Where photographs and masks come from, by image id."""

    def image(self, image_id: str) -> UInt8Array:
        """Return a photograph, uint8 RGB (1280, 1918, 3)."""

    def mask(self, image_id: str) -> UInt8Array:
        """Return a mask, uint8 of 0 and 1, (1280, 1918)."""


@dataclass(frozen=True)
class ExportJob:
    """A model to export, and the photographs to do it with."""

    model: str
    fold: int
    """Whose net is exported where a file holds one."""
    folders: Mapping[int, Path]
    """Of trained nets by fold: that of ``fold``, and those of the ensemble."""
    digests: Mapping[int, str]
    """Of all trained nets of the model by fold, which tell them from nets that are trained later."""
    ensemble: Sequence[int]
    """Folds of the ensemble."""
    weights: str
    views: Sequence[str]
    """Of the ensemble."""
    merge: MergeName
    threshold: float
    reader: ExportImages
    check_ids: Sequence[str]
    """Image ids that exports are checked on."""
    calibration: Sequence[str]
    """Image ids that 8 bits are calibrated on, which the net of ``fold`` learned from."""


class ExportContext:
    """The nets of a job, their ONNX files in ``folder``, and what exports are compared with.

    Raises CarvanaError if nets are missing or want to see different pictures.
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
                    f"The nets of {job.model} for folds {job.fold} and {fold} want to see different pictures: train "
                    "them with one setting, or name formats of a single net with --format."
                )

    @property
    def net(self) -> SegmentationModel:
        """The net that is exported where a file holds one, on the CPU."""
        return self._predictors[self.job.fold].net

    @property
    def input(self) -> InputSettings:
        """What the nets want to see."""
        return self._predictors[self.job.fold].input

    @property
    def weights(self) -> Path:
        """The weights of ``net``."""
        return self.job.folders[self.job.fold] / WEIGHTS[self.job.weights]

    def facts(self, fold: int | None = None) -> OnnxMetadata:
        """Return what the file of one fold's net says of itself, or that of the ensemble."""
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
        """Return the ONNX file of a fold's net, made once."""
        path = self._folder / f"fold-{fold}.onnx"
        if not path.exists():
            write_onnx(self._predictors[fold].net, self.facts(fold), path)
        return path

    def calibration(self) -> Iterator[UInt8Array]:
        """Yield the photographs that 8 bits are calibrated on, prepared."""
        return (to_network_input(self.job.reader.image(image_id), self.input) for image_id in self.job.calibration)

    @cached_property
    def net_proofs(self) -> list[ReferencePrediction]:
        """What the net says of the images that exports are checked on."""
        return [self._net_proof(image_id) for image_id in self.job.check_ids]

    @cached_property
    def ensemble_proofs(self) -> list[ReferencePrediction]:
        """What the pipeline makes of them with all nets, views and the merge."""
        return [self._ensemble_proof(image_id) for image_id in self.job.check_ids]

    def _net_proof(self, image_id: str) -> ReferencePrediction:
        sees, true_HW = self._image(image_id)
        probability_HW = self._reference(self.job.fold, TTATransform(), sees)
        return ReferencePrediction(sees, probability_HW, true_HW, confusion_counts(probability_HW >= 0.5, true_HW).dice)

    def _ensemble_proof(self, image_id: str) -> ReferencePrediction:
        """Masks are those of a submission, from rounded levels; probabilities are the same, unrounded."""
        sees, true_HW = self._image(image_id)
        job, maps, means = self.job, list[ProbabilityMap](), list[Probability]()
        for fold in job.ensemble:
            levels_VHW = self._predictors[fold].predict_u8([sees], HEIGHT, WIDTH)[0]
            maps.append(sum_views(image_id, "+".join(job.views), levels_VHW))
            views = [self._reference(fold, TTATransform.parse(name), sees) for name in job.views]
            means.append(_mean(views))
        merge = MergeRule(job.merge, job.threshold, (len(job.views),) * len(maps), (1,) * len(maps))
        dice = confusion_counts(merge.mask(maps), true_HW).dice
        return ReferencePrediction(sees, self._merged(means), true_HW, dice, self._undecided(means))

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

    def _undecided(self, means: Sequence[Probability]) -> BoolArray | None:
        if self.job.merge != "majority_vote":
            return None
        near = [np.abs(mean - self.job.threshold) < MAX_DIFFERENCE for mean in means]
        return np.asarray(np.any(near, axis=0))

    @torch.inference_mode()
    def _reference(self, fold: int, view: TTATransform, sees: UInt8Array) -> Probability:
        """Return the probability (1280, 1918) of a net in a view, unrounded."""
        pixels = torch.from_numpy(sees).permute(2, 0, 1)[None].float()
        return full_size_probability(view.deaugment(self._predictors[fold].net(view.augment(pixels)))[0, 0].numpy())

    def _image(self, image_id: str) -> tuple[UInt8Array, BoolArray]:
        reader = self.job.reader
        return to_network_input(reader.image(image_id), self.input), reader.mask(image_id) > 0


def _mean(rasters: Sequence[Probability]) -> Probability:
    return np.asarray(np.mean(rasters, axis=0, dtype=np.float32), np.float32)
