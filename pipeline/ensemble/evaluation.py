"""Score the ensemble and its nets on validation and holdout images."""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.competition.dice import confusion_counts
from pipeline.competition.image_ids import parse_image_id
from pipeline.config import ENSEMBLE_NAME, EnsembleSettings, NetId, Params
from pipeline.ensemble.merge import MergeRule
from pipeline.ensemble.postprocess import ImageLoader, MaskBuilder
from pipeline.inference.prediction_store import PredictionStore
from pipeline.workspace import predictions_dir


@dataclass(frozen=True)
class EnsembleContext:
    """Every fold of every active model."""

    settings: EnsembleSettings
    views: Sequence[str]
    """Those in which all look."""
    models: Sequence[str]
    folds: Sequence[int]
    ensemble: Sequence[NetId]
    """Those of them that are merged."""
    store: Callable[[str, str, int], PredictionStore]
    """Maps by split, model and fold."""
    image: ImageLoader
    """Asked for where the settings post-process by photographs."""

    @property
    def merged_models(self) -> list[str]:
        """The ensemble's models."""
        return list(dict.fromkeys(model for model, _ in self.ensemble))

    def stores(self, split: str, nets: Sequence[NetId]) -> list[PredictionStore]:
        """Return the maps of some nets."""
        return [self.store(split, *net) for net in nets]

    def merge_rule(self, nets: Sequence[NetId]) -> MergeRule:
        """Return how the settings merge some nets."""
        return build_merge_rule(self.settings, nets, len(self.views))

    def mask_builder(self, nets: Sequence[NetId]) -> MaskBuilder:
        """Return how the settings make a mask of what some nets say."""
        return build_mask_builder(self.settings, nets, len(self.views), self.image)


def build_merge_rule(settings: EnsembleSettings, nets: Sequence[NetId], views: int) -> MergeRule:
    """Return the merge of ``nets``, each a sum of as many views."""
    weights = tuple(settings.weights.get(model, 1) for model, _ in nets)
    return MergeRule(settings.merge, settings.threshold, (views,) * len(nets), weights)


def build_mask_builder(
    settings: EnsembleSettings, nets: Sequence[NetId], views: int, image: ImageLoader
) -> MaskBuilder:
    """Return how maps of ``nets``, each a sum of as many views, become a mask."""
    return MaskBuilder(build_merge_rule(settings, nets, views), settings.postprocess, image)


def ensemble_context(params: Params, image: ImageLoader) -> EnsembleContext:
    """Return the active nets; ``image`` returns a photograph by its id."""
    return EnsembleContext(
        settings=params.ensemble,
        views=params.predict.tta.test,
        models=params.models.active,
        folds=params.folds.active,
        ensemble=params.ensemble_members(),
        store=stored_predictions,
        image=image,
    )


def stored_predictions(split: str, model: str, fold: int) -> PredictionStore:
    """Return the maps of a net; raises CarvanaError that says which command makes them, if they are not there."""
    return PredictionStore(predictions_dir(split, model, fold))


MaskLoader = Callable[[str], NDArray[np.uint8]]
"""Mask (1280, 1918) of 0 and 1, by image id."""

SCORE_COLUMNS = ("dice", "iou", "accuracy")


def iter_masks(
    stores: Sequence[PredictionStore],
    decision: MaskBuilder,
    views: Sequence[str],
    image_ids: Container[str] | None = None,
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Yield the id and mask of every image, or of some, merged from the maps of nets that all predicted it."""
    for number in range(stores[0].shard_count()):
        for maps in zip(*(store.images(number, views) for store in stores), strict=True):
            if image_ids is None or maps[0].image_id in image_ids:
                yield maps[0].image_id, decision.mask(maps)


def score_images(
    stores: Sequence[PredictionStore], decision: MaskBuilder, views: Sequence[str], true_mask: MaskLoader, words: str
) -> pd.DataFrame:
    """Return a row an image: image_id, car, angle, dice, iou, accuracy, as Kaggle counts them at 1280 x 1918."""
    rows = []
    masks = iter_masks(stores, decision, views)
    for image_id, mask_HW in tqdm(masks, desc=words, total=len(stores[0].image_ids), unit="image"):
        counts = confusion_counts(mask_HW, true_mask(image_id))
        rows.append((image_id, *parse_image_id(image_id), counts.dice, counts.iou, counts.accuracy))
    return pd.DataFrame(rows, columns=["image_id", "car", "angle", *SCORE_COLUMNS])


def summarise(images: pd.DataFrame) -> dict[str, float]:
    """Return the means over images, and how many images and cars they rest on."""
    means = {name: round(float(images[name].mean()), 6) for name in SCORE_COLUMNS}
    return means | {"images": len(images), "cars": int(images["car"].nunique())}


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
