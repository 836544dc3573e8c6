"""The images with the lowest Dice, scored again under other settings."""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from pipeline import workspace
from pipeline.ablation.runner import ScoringGroup, score_settings, scoring_groups
from pipeline.ablation.search_space import EnsembleConfig
from pipeline.app import page_parts
from pipeline.app.page_parts import FileFingerprint, escape_markdown, file_fingerprint
from pipeline.config import PARAMS_FILE, EnsembleSettings, ScoredSplit, read_params
from pipeline.data.competition_data import LabeledImages
from pipeline.ensemble.disagreement import ImagePredictions, MemberPredictions
from pipeline.ensemble.evaluation import EnsembleContext, stored_predictions
from pipeline.errors import CarvanaError
from pipeline.inference.probability_map import CompressedMap
from pipeline.report import overlays
from pipeline.report.overlays import Figure
from pipeline.report.tables import TableRow, describe_setting, rows_of_split, worst_images
from pipeline.workspace import REPORTS_DIR

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
        o.image_id: _figure_of_setting(by_image[o.image_id], o, images)
        for o in MemberPredictions(nets).iter_images(split, by_image)
    }
    return [drawn[image_id] for image_id in by_image]


def _of_setting(panel: ScoringGroup, setting: EnsembleConfig, on_image: Callable[[], object]) -> _WatchedGroup:
    stores = dict(zip(panel.nets, panel.stores, strict=True))
    return _WatchedGroup(setting.nets, [stores[net] for net in setting.nets], setting.views, on_image)


def _figure_of_setting(row: Mapping[Any, Any], opinion: ImagePredictions, images: LabeledImages) -> Figure:
    image_HWC, true_HW = images.image(opinion.image_id), images.mask(opinion.image_id)
    return overlays.worst_image_figure(
        row, None, image_HWC, true_HW, opinion.mask_HW.view("uint8"), opinion.disagreement_HW
    )


_KEPT = 8
"""Settings whose scores a session remembers: on the whole competition they are some MB each."""

_SHOWN = 6
"""Images, at most two of a car."""


def show(row: TableRow, split: ScoredSplit, facts: Mapping[str, Any]) -> None:
    """Draw the part of the page that shows the setting of a row of ``ablation.csv``; ``facts`` are of its JSON.

    Raises CarvanaError if images or maps are not available, or not those that were ablated.
    """
    st.subheader("Where it does worst")
    st.markdown(
        ("The current setting: " if row["current"] else "The chosen setting: ") + escape_markdown(describe_setting(row))
    )
    params, setting = read_params(), setting_of(row)
    images = page_parts.training_images()
    split_panels = _panels(split, _stamp_of_maps(split))
    if not {store.net for panel in split_panels for store in panel.stores} <= set(facts["nets"].values()):
        raise CarvanaError("Nets changed since the last ablation: run 'dvc repro ablate' first.")
    scored = _scores(row, split, split_panels, images)
    lowest = worst_images(scored, _SHOWN, of_a_car=2)
    with st.spinner("Drawing them ..."):
        drawn = _figures(setting, _digests(split_panels), lowest, params.folds.active, images)
    st.caption(
        "Left: the true outline is green, car that was missed orange, what was taken for car red. "
        "Right: the brighter, the less sure are the nets, or the less they agree."
    )
    for start in range(0, len(drawn), 2):
        for figure, place in zip(drawn[start : start + 2], st.columns(2), strict=False):
            with place.container(border=True):
                _figure(figure)


def _figure(figure: Figure) -> None:
    st.markdown(f"**{' · '.join(map(escape_markdown, [figure.facts[0], figure.title]))}**")
    for picture, place in zip(figure.pictures, st.columns(2), strict=True):
        place.image(picture.source, caption=picture.words)
    st.caption(escape_markdown(" · ".join(figure.facts[2:])))


def _scores(
    row: TableRow, split: ScoredSplit, split_panels: Sequence[ScoringGroup], images: LabeledImages
) -> pd.DataFrame:
    """Return a row an image: from the ablation itself for the current setting, else scored now and kept."""
    doubts = REPORTS_DIR / "image_disagreement.csv"
    if row["current"] and doubts.is_file():
        return rows_of_split(page_parts.read_report_table(doubts.name), split)
    kept: dict[Any, pd.DataFrame] = st.session_state.setdefault("scores", {})
    key = setting_of(row), _digests(split_panels)
    if key not in kept:
        place = st.empty()
        bar = place.progress(0.0, "Scoring every image under this setting ...")
        kept[key] = score_images(split_panels, key[0], images, bar.progress)
        if len(kept) > _KEPT:
            del kept[next(iter(kept))]
        place.empty()
    return kept[key]


@st.cache_resource(max_entries=2, show_spinner="Looking at the stored predictions ...")
def _panels(split: ScoredSplit, maps: FileFingerprint) -> list[ScoringGroup]:
    return scoring_groups(read_params(), page_parts.training_images().ids(), workspace.read_fold_by_car(), split)


def _stamp_of_maps(split: ScoredSplit) -> FileFingerprint:
    """Return what tells whether ``_panels`` are still the same."""
    params = read_params()
    nets = [(model, fold) for model in params.models.active for fold in params.folds.active]
    indexes = (workspace.predictions_dir(split, *net) / "index.json" for net in nets)
    weights = (path for net in nets for path in sorted(workspace.net_dir(*net).glob("*.safetensors")))
    return file_fingerprint([Path(PARAMS_FILE), workspace.MANIFEST_FILE, workspace.FOLDS_FILE, *indexes, *weights])


def _digests(split_panels: Sequence[ScoringGroup]) -> tuple[str, ...]:
    return tuple(store.digest for panel in split_panels for store in panel.stores)


@st.cache_data(max_entries=32, show_spinner=False)
def _figures(
    setting: EnsembleConfig,
    digests: tuple[str, ...],
    _lowest: pd.DataFrame,
    active: Sequence[int],
    _images: LabeledImages,
) -> list[Figure]:
    return draw(_lowest, setting, active, _images)
