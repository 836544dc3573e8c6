"""The images with the lowest Dice under any setting of the ablation."""

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
from pipeline.ensemble.evaluation import EnsembleContext, ImagePredictions, MemberPredictions, stored_predictions
from pipeline.errors import CarvanaError
from pipeline.inference.probability_map import CompressedMap
from pipeline.report import overlays
from pipeline.report.overlays import Figure
from pipeline.report.tables import TableRow, describe_setting, rows_of_split, worst_images
from pipeline.workspace import REPORTS_DIR

OnProgress = Callable[[float], object]
"""Called with the progress, 0 to 1."""


def setting_of(row: Mapping[Any, Any]) -> EnsembleConfig:
    """Return the setting of a row of ablation.csv."""
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
    """The nets of one setting; reads only the setting's views, and reports each image read."""

    views: Sequence[str]
    on_image: Callable[[], object]

    def read(self, image_ids: Container[str] | None = None) -> Iterator[list[list[CompressedMap]]]:
        for compressed_NV in super().read(image_ids):
            self.on_image()
            yield [[m for m in net_maps if m.view in self.views] for net_maps in compressed_NV]


def score_images(
    groups: Sequence[ScoringGroup], setting: EnsembleConfig, images: LabeledImages, progress: OnProgress
) -> pd.DataFrame:
    """Return one row per image, with the columns of image_disagreement.csv.

    ``groups``: the stored maps of the setting's split.
    """
    total = sum(len(group.stores[0].image_ids) for group in groups)
    done = 0

    def count_image() -> None:
        nonlocal done
        done += 1
        if 100 * done // total > 100 * (done - 1) // total:  # once per percent, as each call goes to the browser
            progress(done / total)

    watched = [_restrict_group(group, setting, count_image) for group in groups]
    views = [view for view in groups[0].stores[0].views if view in setting.views]
    scores = score_settings(watched, [setting], views, images.mask, "Scoring images")
    split = "holdout" if setting.folds else "oof"
    return scores.images.assign(dice=scores.dice_SI[0], split=split)


def draw(rows: pd.DataFrame, setting: EnsembleConfig, active: Sequence[int], images: LabeledImages) -> list[Figure]:
    """Return one figure per row of `score_images`, in order, with errors and disagreement.

    ``active``: the active folds, which a setting without folds uses out of fold.
    """
    folds = setting.folds or tuple(active)
    context = EnsembleContext(
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
    figures = {
        p.image_id: _figure_of_setting(by_image[p.image_id], p, images)
        for p in MemberPredictions(context).iter_images(split, by_image)
    }
    return [figures[image_id] for image_id in by_image]


def _restrict_group(group: ScoringGroup, setting: EnsembleConfig, on_image: Callable[[], object]) -> _WatchedGroup:
    stores = dict(zip(group.nets, group.stores, strict=True))
    return _WatchedGroup(setting.nets, [stores[net] for net in setting.nets], setting.views, on_image)


def _figure_of_setting(row: Mapping[Any, Any], predictions: ImagePredictions, images: LabeledImages) -> Figure:
    image_HWC, true_HW = images.image(predictions.image_id), images.mask(predictions.image_id)
    mask_HW = predictions.mask_HW.view("uint8")
    return overlays.worst_image_figure(row, None, image_HWC, true_HW, mask_HW, predictions.disagreement_HW)


_CACHED_SETTINGS = 8
"""Settings whose scores a session keeps; on the full competition they take a few MB each."""

_SHOWN = 6
"""Number of images, at most two per car."""


def show(row: TableRow, split: ScoredSplit, ablation: Mapping[str, Any]) -> None:
    """Draw the worst images of a row of ablation.csv; ``ablation`` is the content of ablation.json.

    Raises CarvanaError if images or maps are not available, or changed since the ablation.
    """
    st.subheader("Worst images")
    st.markdown(
        ("Current setting: " if row["current"] else "Selected setting: ") + escape_markdown(describe_setting(row))
    )
    params, setting = read_params(), setting_of(row)
    images = page_parts.training_images()
    groups = _groups(split, _maps_fingerprint(split))
    if not {store.net for group in groups for store in group.stores} <= set(ablation["nets"].values()):
        raise CarvanaError("Nets changed since the last ablation. Run 'dvc repro ablate' first.")
    scored = _scores(row, split, groups, images)
    lowest = worst_images(scored, _SHOWN, per_car=2)
    with st.spinner("Drawing ..."):
        figures = _figures(setting, _digests(groups), lowest, params.folds.active, images)
    st.caption(
        "Left: true outline green, false negatives orange, false positives red. "
        "Right: disagreement between nets, or the uncertainty of a single net; bright is high."
    )
    for start in range(0, len(figures), 2):
        for figure, place in zip(figures[start : start + 2], st.columns(2), strict=False):
            with place.container(border=True):
                _figure(figure)


def _figure(figure: Figure) -> None:
    st.markdown(f"**{' · '.join(map(escape_markdown, [figure.facts[0], figure.title]))}**")
    for image, place in zip(figure.images, st.columns(2), strict=True):
        place.image(image.source, caption=image.caption)
    st.caption(escape_markdown(" · ".join(figure.facts[2:])))


def _scores(row: TableRow, split: ScoredSplit, groups: Sequence[ScoringGroup], images: LabeledImages) -> pd.DataFrame:
    """Return one row per image: from the ablation for the current setting, else scored now and cached."""
    path = REPORTS_DIR / "image_disagreement.csv"
    if row["current"] and path.is_file():
        return rows_of_split(page_parts.read_report_table(path.name), split)
    cached: dict[Any, pd.DataFrame] = st.session_state.setdefault("scores", {})
    key = setting_of(row), _digests(groups)
    if key not in cached:
        place = st.empty()
        bar = place.progress(0.0, "Scoring all images with this setting ...")
        cached[key] = score_images(groups, key[0], images, bar.progress)
        if len(cached) > _CACHED_SETTINGS:
            del cached[next(iter(cached))]
        place.empty()
    return cached[key]


@st.cache_resource(max_entries=2, show_spinner="Reading the stored predictions ...")
def _groups(split: ScoredSplit, maps: FileFingerprint) -> list[ScoringGroup]:
    return scoring_groups(read_params(), page_parts.training_images().ids(), workspace.read_fold_by_car(), split)


def _maps_fingerprint(split: ScoredSplit) -> FileFingerprint:
    """Return a fingerprint of everything that `_groups` depends on."""
    params = read_params()
    nets = [(model, fold) for model in params.models.active for fold in params.folds.active]
    indexes = (workspace.predictions_dir(split, *net) / "index.json" for net in nets)
    weights = (path for net in nets for path in sorted(workspace.net_dir(*net).glob("*.safetensors")))
    return file_fingerprint([Path(PARAMS_FILE), workspace.MANIFEST_FILE, workspace.FOLDS_FILE, *indexes, *weights])


def _digests(groups: Sequence[ScoringGroup]) -> tuple[str, ...]:
    return tuple(store.digest for group in groups for store in group.stores)


@st.cache_data(max_entries=32, show_spinner=False)
def _figures(
    setting: EnsembleConfig,
    digests: tuple[str, ...],
    _lowest: pd.DataFrame,
    active: Sequence[int],
    _images: LabeledImages,
) -> list[Figure]:
    return draw(_lowest, setting, active, _images)
