"""Out-of-fold and holdout predictions per image: the ensemble mask, one mask per net, and a disagreement map."""

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
    """Predictions for one image; every array has shape (1280, 1918)."""

    image_id: str
    mask_HW: BoolArray
    """The mask merged from the nets that did not train on this car, with the current settings."""
    nets: Mapping[str, BoolArray]
    """The mask of each single net, without post-processing, by ``model/fold``."""
    disagreement_HW: NDArray[np.uint8]
    """0 where all nets agree, 255 where they split evenly. With a single net: its uncertainty, as `uncertainty_map`."""


@dataclass(frozen=True)
class MemberPredictions:
    """Yields the predictions of the active nets, merged with the ensemble settings."""

    context: EnsembleContext

    def iter_images(self, split: str, image_ids: Collection[str]) -> Iterator[ImagePredictions]:
        """Yield the predictions for some images of ``oof`` or ``holdout``, fold by fold.

        Only nets that did not train on a car are used: on validation cars those of its fold, on held-out cars all.
        """
        wanted, models, folds = set(image_ids), self.context.models, self.context.folds
        if split == "holdout":
            yield from self._of_group(split, wanted, [(m, f) for m in models for f in folds], self.context.ensemble)
            return
        for fold in folds:
            merged = [(model, fold) for model in self.context.merged_models]
            yield from self._of_group(split, wanted, [(model, fold) for model in models], merged)

    def _of_group(
        self, split: str, wanted: set[str], nets: Sequence[NetId], merged: Sequence[NetId]
    ) -> Iterator[ImagePredictions]:
        if not wanted:
            return
        mask_builder, single_net_rule = self.context.mask_builder(merged), self.context.merge_rule(nets[:1])
        maps_by_store = [store.iter_images(wanted, self.context.views) for store in self.context.stores(split, nets)]
        for maps in zip(*maps_by_store, strict=True):
            by_net = dict(zip(nets, maps, strict=True))
            masks = {f"{model}/{fold}": single_net_rule.mask([by_net[model, fold]]) for model, fold in nets}
            yield ImagePredictions(
                maps[0].image_id,
                mask_builder.mask([by_net[net] for net in merged]),
                masks,
                disagreement_map(list(masks.values())) if len(maps) > 1 else uncertainty_map(maps[0]),
            )


def disagreement_map(masks: Sequence[BoolArray]) -> NDArray[np.uint8]:
    """Return where masks (H, W) differ, uint8: 0 where all agree, 255 where they split evenly."""
    votes_HW = np.sum(masks, axis=0, dtype=np.uint16)
    minority_HW = np.minimum(votes_HW, len(masks) - votes_HW)
    return (minority_HW * (255 // (len(masks) // 2))).astype(np.uint8)


def uncertainty_map(prob_map: ProbabilityMap, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    """Return a net's uncertainty, uint8 (height, width): 0 at probability 0 or 1, 255 at 0.5."""
    probability_HW = prob_map.to_full_size(height, width) / np.float32(MAX_LEVEL * prob_map.count)
    return np.asarray(np.rint(255 * (1 - np.abs(2 * probability_HW - 1))), np.uint8)
