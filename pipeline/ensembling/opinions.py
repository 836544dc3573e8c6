"""What the nets that never saw a car say about some of its images: the mask of all, the masks of each, their doubt."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.competition.layout import HEIGHT, WIDTH
from pipeline.ensembling.active import ActiveNets, Net
from pipeline.ensembling.maps import FULL, LevelMap

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Opinion:
    """Of one image, at (1280, 1918)."""

    image_id: str
    mask_HW: Mask
    """As the settings make it of those of their nets that may speak."""
    nets: Mapping[str, Mask]
    """The mask of each net that may speak by itself, without the steps after a merge, by ``model/fold``."""
    doubt_HW: NDArray[np.uint8]
    """Where the nets part: 0 where all say the same, 255 where half say otherwise.

    Of a single net how near it is to undecided: 0 certain, 255 in the middle.
    """


@dataclass(frozen=True)
class Opinions:
    """Of the active nets, merged by the settings of the ensemble."""

    nets: ActiveNets

    def of(self, split: str, image_ids: Collection[str]) -> Iterator[Opinion]:
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

    def _of_group(self, split: str, wanted: set[str], speak: Sequence[Net], merged: Sequence[Net]) -> Iterator[Opinion]:
        if not wanted:
            return
        decision, alone = self.nets.decision(merged), self.nets.merge(speak[:1])
        of_nets = [store.of_images(wanted, self.nets.views) for store in self.nets.maps(split, speak)]
        for maps in zip(*of_nets, strict=True):
            by_net = dict(zip(speak, maps, strict=True))
            masks = {f"{model}/{fold}": alone.mask([by_net[model, fold]]) for model, fold in speak}
            yield Opinion(
                maps[0].image_id,
                decision.mask([by_net[net] for net in merged]),
                masks,
                doubt(list(masks.values())) if len(maps) > 1 else undecided(maps[0]),
            )


def doubt(masks: Sequence[Mask]) -> NDArray[np.uint8]:
    """Return where some nets' masks (H, W) part: 0 where all say the same, 255 where half say otherwise."""
    car_HW = np.sum(masks, axis=0, dtype=np.uint16)
    fewer_HW = np.minimum(car_HW, len(masks) - car_HW)
    return (fewer_HW * (255 // (len(masks) // 2))).astype(np.uint8)


def undecided(level_map: LevelMap, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    """Return how near to undecided a net is at each pixel (height, width): 0 certain, 255 in the middle."""
    probability_HW = level_map.raster(height, width) / np.float32(FULL * level_map.count)
    return np.asarray(np.rint(255 * (1 - np.abs(2 * probability_HW - 1))), np.uint8)
