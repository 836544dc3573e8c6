"""What the nets that never saw a car say about some of its images: the mask of all, the masks of each, their doubt."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.config import NetId
from pipeline.ensemble.evaluation import EnsembleContext
from pipeline.inference.probability_map import MAX_LEVEL, ProbabilityMap
from pipeline.utils.arrays import BoolArray


@dataclass(frozen=True)
class ImagePredictions:
    """Of one image, at (1280, 1918)."""

    image_id: str
    mask_HW: BoolArray
    """As the settings make it of those of their nets that may speak."""
    nets: Mapping[str, BoolArray]
    """The mask of each net that may speak by itself, without the steps after a merge, by ``model/fold``."""
    disagreement_HW: NDArray[np.uint8]
    """Where the nets part: 0 where all say the same, 255 where half say otherwise.

    Of a single net how near it is to undecided: 0 certain, 255 in the middle.
    """


@dataclass(frozen=True)
class MemberPredictions:
    """Of the active nets, merged by the settings of the ensemble."""

    nets: EnsembleContext

    def iter_images(self, split: str, image_ids: Collection[str]) -> Iterator[ImagePredictions]:
        """Yield the opinion on each of some images of ``oof`` or ``holdout``, those of a fold together.

        Of validation cars only the nets of their fold may speak; of held-out cars all may.
        """
        wanted, models, folds = set(image_ids), self.nets.models, self.nets.folds
        if split == "holdout":
            yield from self._of_group(split, wanted, [(m, f) for m in models for f in folds], self.nets.ensemble)
            return
        for fold in folds:
            merged = [(model, fold) for model in self.nets.merged_models]
            yield from self._of_group(split, wanted, [(model, fold) for model in models], merged)

    def _of_group(
        self, split: str, wanted: set[str], speak: Sequence[NetId], merged: Sequence[NetId]
    ) -> Iterator[ImagePredictions]:
        if not wanted:
            return
        decision, alone = self.nets.mask_builder(merged), self.nets.merge_rule(speak[:1])
        of_nets = [store.iter_images(wanted, self.nets.views) for store in self.nets.stores(split, speak)]
        for maps in zip(*of_nets, strict=True):
            by_net = dict(zip(speak, maps, strict=True))
            masks = {f"{model}/{fold}": alone.mask([by_net[model, fold]]) for model, fold in speak}
            yield ImagePredictions(
                maps[0].image_id,
                decision.mask([by_net[net] for net in merged]),
                masks,
                disagreement_map(list(masks.values())) if len(maps) > 1 else uncertainty_map(maps[0]),
            )


def disagreement_map(masks: Sequence[BoolArray]) -> NDArray[np.uint8]:
    """Return where some nets' masks (H, W) part: 0 where all say the same, 255 where half say otherwise."""
    car_HW = np.sum(masks, axis=0, dtype=np.uint16)
    fewer_HW = np.minimum(car_HW, len(masks) - car_HW)
    return (fewer_HW * (255 // (len(masks) // 2))).astype(np.uint8)


def uncertainty_map(level_map: ProbabilityMap, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    """Return how near to undecided a net is at each pixel (height, width): 0 certain, 255 in the middle."""
    probability_HW = level_map.to_full_size(height, width) / np.float32(MAX_LEVEL * level_map.count)
    return np.asarray(np.rint(255 * (1 - np.abs(2 * probability_HW - 1))), np.uint8)
