"""A part of the page Compare: the images on which a setting does worst, with its errors."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from pipeline.app import project
from pipeline.app.faults import escape_markdown
from pipeline.app.project import REPORTS_DIR, FileFingerprint, file_fingerprint
from pipeline.app.rescore import draw, score_images, setting_of
from pipeline.data.source import LabeledImages
from pipeline.ensembling.ablation import ScoringGroup
from pipeline.ensembling.grid import EnsembleConfig, ScoredSplit
from pipeline.errors import CarvanaError
from pipeline.params import PARAMS_FILE, read_params
from pipeline.reporting.figures import Figure
from pipeline.reporting.tables import describe_setting, rows_of_split, worst_images
from pipeline.stages import inputs
from pipeline.stages.ablate import scoring_groups

TableRow = Mapping[Any, Any]

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
    images = project.training_images()
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
        return rows_of_split(project.read_report_table(doubts.name), split)
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
    return scoring_groups(read_params(), project.training_images().ids(), inputs.read_fold_by_car(), split)


def _stamp_of_maps(split: ScoredSplit) -> FileFingerprint:
    """Return what tells whether ``_panels`` are still the same."""
    params = read_params()
    nets = [(model, fold) for model in params.models.active for fold in params.folds.active]
    indexes = (inputs.predictions_dir(split, *net) / "index.json" for net in nets)
    weights = (path for net in nets for path in sorted(inputs.net_dir(*net).glob("*.safetensors")))
    return file_fingerprint([Path(PARAMS_FILE), inputs.MANIFEST_FILE, inputs.FOLDS_FILE, *indexes, *weights])


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
