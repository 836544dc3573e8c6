"""What exports are made of, and what PyTorch says, made once for all formats."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.competition.layout import HEIGHT, WIDTH
from pipeline.competition.metric import confusion_counts
from pipeline.ensembling.ensemble import MergeName, MergeRule
from pipeline.ensembling.maps import MAX_LEVEL, ProbabilityMap, sum_views
from pipeline.errors import CarvanaError
from pipeline.exporting.check import MAX_DIFFERENCE, BoolArray, ReferencePrediction, full_size_probability
from pipeline.exporting.facts import OnnxMetadata
from pipeline.exporting.graphs import write_onnx
from pipeline.learning.inference import TorchPredictor
from pipeline.learning.models import WEIGHTS, SegmentationModel
from pipeline.learning.rasters import UInt8Array, to_network_input
from pipeline.learning.settings import InputSettings
from pipeline.learning.views import TTATransform

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
