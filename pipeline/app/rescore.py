"""A setting of ``ablation.csv`` scored again, image by image, on the stored maps, and drawn."""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pipeline.data.source import LabeledImages
from pipeline.ensembling.ablation import ScoringGroup, score_settings
from pipeline.ensembling.active import EnsembleContext
from pipeline.ensembling.ensemble import EnsembleSettings
from pipeline.ensembling.grid import EnsembleConfig
from pipeline.ensembling.maps import CompressedMap
from pipeline.ensembling.opinions import ImagePredictions, MemberPredictions
from pipeline.reporting import figures
from pipeline.reporting.figures import Figure
from pipeline.stages.active import stored_predictions

OnProgress = Callable[[float], object]
"""Told how much is done, 0 to 1."""


def setting_of(row: Mapping[Any, Any]) -> EnsembleConfig:
    """Return the setting that a row of ``ablation.csv`` is about."""
    models = tuple(row["models"].split())
    weights = dict(pair.split("=") for pair in row["weights"].split())
    return EnsembleConfig(
        models=models,
        folds=tuple(map(int, row["folds"].split())),
        views=tuple(row["views"].split()),
        merge=row["merge"],
        weights=tuple(int(weights.get(model, 1)) for model in models),
        threshold=row["threshold"],
    )


@dataclass(frozen=True)
class _WatchedGroup(ScoringGroup):
    """A panel of a setting's own nets, that unpacks no view but the setting's, and tells of each image that is read."""

    views: Sequence[str]
    on_image: Callable[[], object]

    def read(self, image_ids: Container[str] | None = None) -> Iterator[list[list[CompressedMap]]]:
        for packed_NV in super().read(image_ids):
            self.on_image()
            yield [[packed for packed in of_net if packed.view in self.views] for of_net in packed_NV]


def score_images(
    panels: Sequence[ScoringGroup], setting: EnsembleConfig, images: LabeledImages, progress: OnProgress
) -> pd.DataFrame:
    """Return one row per image, with the columns of ``image_disagreement.csv``: image_id, car, angle, dice and so on.

    ``panels`` hold all the maps of the setting's split.
    """
    total = sum(len(panel.stores[0].image_ids) for panel in panels)
    done = 0

    def one_more() -> None:
        nonlocal done
        done += 1
        if 100 * done // total > 100 * (done - 1) // total:  # a browser hears of each
            progress(done / total)

    watched = [_of_setting(panel, setting, one_more) for panel in panels]
    views = [view for view in panels[0].stores[0].views if view in setting.views]
    trial = score_settings(watched, [setting], views, images.mask, "Finding a setting's worst images")
    split = "holdout" if setting.folds else "oof"
    return trial.images.assign(dice=trial.dice_SI[0], split=split)


def draw(rows: pd.DataFrame, setting: EnsembleConfig, active: Sequence[int], images: LabeledImages) -> list[Figure]:
    """Return a figure a row of ``score_images``, in their order: its errors, and where nets part.

    ``active`` are the folds that out of fold each see their own images.
    """
    folds = setting.folds or tuple(active)
    nets = EnsembleContext(
        settings=EnsembleSettings(
            weights=dict(zip(setting.models, setting.weights, strict=True)),
            merge=setting.merge,
            threshold=setting.threshold,
        ),
        views=setting.views,
        models=setting.models,
        folds=folds,
        ensemble=[(model, fold) for model in setting.models for fold in folds],
        store=stored_predictions,
        image=images.image,
    )
    by_image = {str(row["image_id"]): row for row in rows.to_dict("records")}
    split = "holdout" if setting.folds else "oof"
    drawn = {
        o.image_id: _figure(by_image[o.image_id], o, images)
        for o in MemberPredictions(nets).iter_images(split, by_image)
    }
    return [drawn[image_id] for image_id in by_image]


def _of_setting(panel: ScoringGroup, setting: EnsembleConfig, on_image: Callable[[], object]) -> _WatchedGroup:
    stores = dict(zip(panel.nets, panel.stores, strict=True))
    return _WatchedGroup(setting.nets, [stores[net] for net in setting.nets], setting.views, on_image)


def _figure(row: Mapping[Any, Any], opinion: ImagePredictions, images: LabeledImages) -> Figure:
    image_HWC, true_HW = images.image(opinion.image_id), images.mask(opinion.image_id)
    return figures.worst_image_figure(
        row, None, image_HWC, true_HW, opinion.mask_HW.view("uint8"), opinion.disagreement_HW
    )
