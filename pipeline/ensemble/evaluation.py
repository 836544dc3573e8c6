"""Score the ensemble and its nets on validation and holdout images."""

from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.competition.dice import confusion_counts
from pipeline.competition.image_ids import HEIGHT, WIDTH, parse_image_id
from pipeline.config import ENSEMBLE_NAME, EnsembleSettings, NetId, Params
from pipeline.ensemble.merge import MergeRule
from pipeline.ensemble.postprocess import ImageLoader, MaskBuilder
from pipeline.inference.prediction_store import PredictionStore
from pipeline.inference.probability_map import MAX_LEVEL, ProbabilityMap
from pipeline.utils.arrays import BoolArray
from pipeline.workspace import predictions_dir


@dataclass(frozen=True)
class EnsembleContext:
    """The active nets, which of them are merged, and how."""

    settings: EnsembleSettings
    views: Sequence[str]
    """TTA views of every net."""
    models: Sequence[str]
    folds: Sequence[int]
    ensemble: Sequence[NetId]
    """The nets that are merged."""
    store: Callable[[str, str, int], PredictionStore]
    """Opens stored predictions by split, model and fold."""
    image: ImageLoader
    """Loads an image by id; called only by ``refine_edges``."""

    @property
    def merged_models(self) -> list[str]:
        """Models with at least one net in the ensemble."""
        return list(dict.fromkeys(model for model, _ in self.ensemble))

    def stores(self, split: str, nets: Sequence[NetId]) -> list[PredictionStore]:
        """Return the stored predictions of some nets."""
        return [self.store(split, *net) for net in nets]

    def merge_rule(self, nets: Sequence[NetId]) -> MergeRule:
        """Return the rule that merges some nets with the current settings."""
        return build_merge_rule(self.settings, nets, len(self.views))

    def mask_builder(self, nets: Sequence[NetId]) -> MaskBuilder:
        """Return what turns the probability maps of some nets into a mask with the current settings."""
        return build_mask_builder(self.settings, nets, len(self.views), self.image)


def build_merge_rule(settings: EnsembleSettings, nets: Sequence[NetId], views: int) -> MergeRule:
    """Return the rule that merges ``nets``, each of which sums the same number of ``views``."""
    weights = tuple(settings.weights.get(model, 1) for model, _ in nets)
    return MergeRule(settings.merge, settings.threshold, (views,) * len(nets), weights)


def build_mask_builder(
    settings: EnsembleSettings, nets: Sequence[NetId], views: int, image: ImageLoader
) -> MaskBuilder:
    """Return what merges and post-processes maps of ``nets``, each of which sums the same number of ``views``."""
    return MaskBuilder(build_merge_rule(settings, nets, views), settings.postprocess, image)


def ensemble_context(params: Params, image: ImageLoader) -> EnsembleContext:
    """Return the active nets with their settings; ``image`` loads an image by id."""
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
    """Return a net's predictions; raises CarvanaError, naming the command to run, if there are none."""
    return PredictionStore(predictions_dir(split, model, fold))


MaskLoader = Callable[[str], NDArray[np.uint8]]
"""Mask (1280, 1918) of 0 and 1, by image id."""

SCORE_COLUMNS = ("dice", "iou", "accuracy")


def iter_masks(
    stores: Sequence[PredictionStore],
    mask_builder: MaskBuilder,
    views: Sequence[str],
    image_ids: Container[str] | None = None,
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Yield id and mask of every image, or of those in ``image_ids``; all ``stores`` must hold the same images."""
    for number in range(stores[0].shard_count()):
        for maps in zip(*(store.images(number, views) for store in stores), strict=True):
            if image_ids is None or maps[0].image_id in image_ids:
                yield maps[0].image_id, mask_builder.mask(maps)


def score_images(
    stores: Sequence[PredictionStore],
    mask_builder: MaskBuilder,
    views: Sequence[str],
    true_mask: MaskLoader,
    progress_label: str,
) -> pd.DataFrame:
    """Return one row per image: image_id, car, angle, dice, iou, accuracy, computed at 1280 x 1918 as Kaggle does."""
    rows = []
    masks = iter_masks(stores, mask_builder, views)
    for image_id, mask_HW in tqdm(masks, desc=progress_label, total=len(stores[0].image_ids), unit="image"):
        counts = confusion_counts(mask_HW, true_mask(image_id))
        rows.append((image_id, *parse_image_id(image_id), counts.dice, counts.iou, counts.accuracy))
    return pd.DataFrame(rows, columns=["image_id", "car", "angle", *SCORE_COLUMNS])


def summarise(images: pd.DataFrame) -> dict[str, float]:
    """Return mean scores over images, with the number of images and cars."""
    means = {name: round(float(images[name].mean()), 6) for name in SCORE_COLUMNS}
    return means | {"images": len(images), "cars": int(images["car"].nunique())}


@dataclass(frozen=True)
class ImageScores:
    """One row per image and merge: split, model, fold (-1: held out), image_id, car, angle, dice, iou, accuracy."""

    images: pd.DataFrame

    def summary(self) -> dict[str, Any]:
        """Return means over images as ``oof.<model>.dice`` and so on, plus ``holdout.dice`` if cars are held out."""
        oof = self.images[self.images["split"] == "oof"]
        held_out = self.images[self.images["split"] == "holdout"]
        summary: dict[str, Any] = {"oof": {str(m): summarise(rows) for m, rows in oof.groupby("model", sort=False)}}
        return summary | ({"holdout": summarise(held_out)} if len(held_out) else {})

    def by_car(self) -> pd.DataFrame:
        """Return mean scores per car."""
        keys = ["split", "model", "fold", "car"]
        return self.images.groupby(keys, sort=False)[list(SCORE_COLUMNS)].mean().reset_index()


@dataclass(frozen=True)
class Evaluation:
    """Scores every active model out of fold, and the ensemble on held-out cars."""

    context: EnsembleContext
    true_mask: MaskLoader

    def score(self, holdout: bool) -> ImageScores:
        """Return the scores of every image; ``holdout``: whether cars are held out."""
        rows = [self._score("oof", name, fold, nets) for name, fold, nets in self._out_of_fold()]
        if holdout:
            rows.append(self._score("holdout", ENSEMBLE_NAME, -1, self.context.ensemble))
        return ImageScores(pd.concat(rows, ignore_index=True))

    def worst_images(self, scores: ImageScores, wanted: int) -> Iterator[tuple[Any, NDArray[np.uint8]]]:
        """Yield the rows with the lowest out-of-fold Dice, lowest first, each with its mask, uint8 (1280, 1918).

        Masks are those of the ensemble's models merged, or of its only model.
        """
        merged_models = self.context.merged_models
        name = ENSEMBLE_NAME if len(merged_models) > 1 else merged_models[0]
        rows = scores.images[(scores.images["split"] == "oof") & (scores.images["model"] == name)]
        lowest = rows.nsmallest(wanted, "dice")
        masks: dict[str, NDArray[np.uint8]] = {}
        for scored_name, fold, nets in self._out_of_fold():
            wanted_ids = set(lowest.loc[lowest["fold"] == fold, "image_id"])
            if scored_name == name and wanted_ids:
                stores, mask_builder = self.context.stores("oof", nets), self.context.mask_builder(nets)
                fold_masks = iter_masks(stores, mask_builder, self.context.views, wanted_ids)
                masks |= {image_id: mask_HW.view(np.uint8) for image_id, mask_HW in fold_masks}
        return ((row, masks[str(row.image_id)]) for row in lowest.itertuples())

    def _out_of_fold(self) -> Iterator[tuple[str, int, Sequence[NetId]]]:
        """Yield name, fold and nets of each model, and of the merged ensemble if it has several models."""
        folds, merged_models = self.context.folds, self.context.merged_models
        for model in self.context.models:
            yield from ((model, fold, [(model, fold)]) for fold in folds)
        if len(merged_models) > 1:
            yield from ((ENSEMBLE_NAME, fold, [(model, fold) for model in merged_models]) for fold in folds)

    def _score(self, split: str, name: str, fold: int, nets: Sequence[NetId]) -> pd.DataFrame:
        label = f"Scoring {split} {name} {fold if fold >= 0 else ''}"
        stores, mask_builder = self.context.stores(split, nets), self.context.mask_builder(nets)
        rows = score_images(stores, mask_builder, self.context.views, self.true_mask, label)
        return rows.assign(split=split, model=name, fold=fold)[["split", "model", "fold", *rows.columns]]


def cv_dice(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return only the Dice of a summary: per model out of fold, and of the ensemble on held-out cars."""
    held_out = {"holdout": summary["holdout"]["dice"]} if "holdout" in summary else {}
    return {"oof": {model: scores["dice"] for model, scores in summary["oof"].items()}, **held_out}


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
