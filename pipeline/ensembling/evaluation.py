"""Nets scored on cars that they never saw: out of fold, and on cars held out of every fold."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pipeline.ensembling.active import EnsembleContext, NetId
from pipeline.ensembling.ensemble import ENSEMBLE_NAME
from pipeline.ensembling.scoring import SCORE_COLUMNS, MaskLoader, iter_masks, score_images, summarise


@dataclass(frozen=True)
class ImageScores:
    """A row an image and merge: split, model, fold (-1 held out), image_id, car, angle, dice, iou, accuracy."""

    images: pd.DataFrame

    def summary(self) -> dict[str, Any]:
        """Return means over images: ``oof.<model>.dice`` and so on, and ``holdout.dice`` where cars are held out."""
        oof = self.images[self.images["split"] == "oof"]
        held_out = self.images[self.images["split"] == "holdout"]
        summary: dict[str, Any] = {"oof": {str(m): summarise(rows) for m, rows in oof.groupby("model", sort=False)}}
        return summary | ({"holdout": summarise(held_out)} if len(held_out) else {})

    def by_car(self) -> pd.DataFrame:
        """Return the means of each car's images."""
        keys = ["split", "model", "fold", "car"]
        return self.images.groupby(keys, sort=False)[list(SCORE_COLUMNS)].mean().reset_index()


@dataclass(frozen=True)
class Evaluation:
    """What to score: every active model out of fold, the ensemble on held-out cars."""

    nets: EnsembleContext
    true_mask: MaskLoader

    def score(self, holdout: bool) -> ImageScores:
        """Return the scores of every image; ``holdout`` tells whether cars are held out."""
        rows = [self._score("oof", name, fold, nets) for name, fold, nets in self._out_of_fold()]
        if holdout:
            rows.append(self._score("holdout", ENSEMBLE_NAME, -1, self.nets.ensemble))
        return ImageScores(pd.concat(rows, ignore_index=True))

    def worst_images(self, scores: ImageScores, wanted: int) -> Iterator[tuple[Any, NDArray[np.uint8]]]:
        """Yield the rows of the lowest out-of-fold Dice, lowest first, with the masks (1280, 1918) that got it.

        Of the models merged as the ensemble merges them, or of its only model.
        """
        merged_models = self.nets.merged_models
        name = ENSEMBLE_NAME if len(merged_models) > 1 else merged_models[0]
        rows = scores.images[(scores.images["split"] == "oof") & (scores.images["model"] == name)]
        lowest = rows.nsmallest(wanted, "dice")
        masks: dict[str, NDArray[np.uint8]] = {}
        for other, fold, nets in self._out_of_fold():
            chosen = set(lowest.loc[lowest["fold"] == fold, "image_id"])
            if other == name and chosen:
                masks |= {i: m.view(np.uint8) for i, m in self._masks("oof", nets, chosen)}
        return ((row, masks[str(row.image_id)]) for row in lowest.itertuples())

    def _out_of_fold(self) -> Iterator[tuple[str, int, Sequence[NetId]]]:
        """Yield the name of each model, and of the ensemble's models merged, with the nets of each fold."""
        folds, merged_models = self.nets.folds, self.nets.merged_models
        for model in self.nets.models:
            yield from ((model, fold, [(model, fold)]) for fold in folds)
        if len(merged_models) > 1:
            yield from ((ENSEMBLE_NAME, fold, [(model, fold) for model in merged_models]) for fold in folds)

    def _score(self, split: str, name: str, fold: int, nets: Sequence[NetId]) -> pd.DataFrame:
        words = f"Scoring {split} {name} {fold if fold >= 0 else ''}"
        maps, decision = self.nets.stores(split, nets), self.nets.mask_builder(nets)
        rows = score_images(maps, decision, self.nets.views, self.true_mask, words)
        return rows.assign(split=split, model=name, fold=fold)[["split", "model", "fold", *rows.columns]]

    def _masks(self, split: str, nets: Sequence[NetId], image_ids: set[str]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        return iter_masks(self.nets.stores(split, nets), self.nets.mask_builder(nets), self.nets.views, image_ids)


def cv_dice(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Dice alone of a summary: by model out of fold, and of the ensemble on held-out cars."""
    held_out = {"holdout": summary["holdout"]["dice"]} if "holdout" in summary else {}
    return {"oof": {model: scores["dice"] for model, scores in summary["oof"].items()}, **held_out}
