"""The page Compare: every setting of the last ablation, as a chart and a table that filter each other by clicks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import streamlit as st

from pipeline.app import page_parts, worst_images
from pipeline.app.page_parts import chart_config, escape_markdown, show_errors
from pipeline.config import ScoredSplit
from pipeline.errors import CarvanaError
from pipeline.report import ablation_text, charts
from pipeline.report.tables import (
    MERGE_TITLES,
    SPLIT_TITLES,
    TableRow,
    best_and_current,
    best_at_each_cost,
    rows_of_split,
)
from pipeline.report.tables import describe_setting as told
from pipeline.workspace import REPORTS_DIR

_MEANING = {
    "oof": "Each car is scored by nets that never saw it: those of its own fold.",
    "holdout": "Cars that no net trained on: the only ones on which folds can be merged and compared.",
}

_SPLITS: Sequence[ScoredSplit] = ("oof", "holdout")

_FILTERS = {"models": "Models", "views": "Views", "merge": "Merge"}

_PICK = "picked"
"""The chart's selection."""


@dataclass(frozen=True)
class _Shown:
    """What chart and table show after all clicks."""

    rows: pd.DataFrame
    """Of the chart."""
    same_cost: pd.DataFrame
    """Of the table, best first: all of them, or those that cost what the points picked in the chart do."""
    chosen: dict[Any, Any] | None
    """The row clicked in the table, else the best one picked in the chart."""
    chart_key: str
    table_key: str


def show() -> None:
    """Draw the page."""
    st.title("Compare")
    if not (REPORTS_DIR / "ablation.csv").is_file():
        st.info(
            "Nothing has been compared yet. Run `carvana repro` in the project's folder: it trains nets and ends with "
            "the comparison. Where predictions are there already, `dvc repro ablate` is enough.",
            icon=":material/info:",
        )
        return
    with show_errors():
        _page()


def _page() -> None:
    table, facts = page_parts.read_report_table("ablation.csv"), page_parts.read_report_json("ablation.json")
    if not {"nets", *_SPLITS} <= facts.keys():
        raise CarvanaError("reports/ablation.json is of another version: run 'dvc repro ablate', which makes it.")
    st.markdown("What other models, views, folds, ways to merge and thresholds would have scored, and at what cost.")
    split: ScoredSplit = st.segmented_control(
        "Cars", _SPLITS, format_func=SPLIT_TITLES.__getitem__, default="oof", required=True
    )
    st.caption(_MEANING[split])
    if "refused" in facts[split]:
        st.info(escape_markdown(facts[split]["refused"]), icon=":material/info:")
        return
    rows = rows_of_split(table, split)
    filtered, name = _filtered(rows, split)
    if filtered.empty:
        st.info("No setting has all of that: take a filter away.", icon=":material/filter_alt_off:")
        return
    shown = _after_clicks(filtered, name)
    _chart(shown)
    _table(shown)
    _show_summary(facts, split)
    worst_images.show(shown.chosen or rows[rows["current"]].iloc[0].to_dict(), split, facts)


def _filtered(rows: pd.DataFrame, split: str) -> tuple[pd.DataFrame, str]:
    """Ask what to keep; return that, and a name for it."""
    kept, names = rows, [split]
    choices = {column: rows[column].unique().tolist() for column in _FILTERS}
    choices = {column: options for column, options in choices.items() if len(options) > 1}
    for (column, options), place in zip(choices.items(), st.columns(len(choices) or 1), strict=False):
        title, say = _FILTERS[column], MERGE_TITLES.__getitem__ if column == "merge" else _joined
        key = f"{column}|{split}"
        wanted: list[str] = place.pills(title, options, format_func=say, selection_mode="multi", wrap=True, key=key)
        kept = kept[kept[column].isin(wanted or options)]
        names.append(f"{column}={wanted}")
    return kept, "|".join(names)


def _joined(names: str) -> str:
    return " + ".join(names.split())


def _after_clicks(rows: pd.DataFrame, name: str) -> _Shown:
    # The keys say what is shown, so that a selection never outlives the rows that it was made in.
    chart_key = f"chart|{name}|{st.session_state.get('cleared', 0)}"
    points = best_at_each_cost(rows)
    picks = {pick["setting"] for pick in _selection(chart_key).get(_PICK, [])}
    picked = points[points.apply(told, axis=1).isin(picks)]
    costs = {_at(row) for row in picked.to_dict("records")}
    alike = rows[[_at(row) in costs for row in rows.to_dict("records")]] if costs else rows
    alike = best_and_current(alike, len(alike)).reset_index(drop=True)
    table_key = f"table|{chart_key}|{sorted(costs)}"
    clicked = alike.iloc[_selection(table_key).get("rows", [])]
    if clicked.empty and costs:
        clicked = alike[alike.apply(told, axis=1).isin(picks)]
    chosen = None if clicked.empty else clicked.iloc[0].to_dict()
    return _Shown(rows, alike, chosen, chart_key, table_key)


def _at(row: TableRow) -> tuple[str, int, str]:
    """Return what decides the cost of a setting, and which point of the chart stands for it."""
    return row["models"], len(row["folds"].split()), row["views"]


def _selection(key: str) -> Mapping[str, Any]:
    """Return what is selected in a chart or table, which may be drawn later than it is asked for."""
    selection: Mapping[str, Any] = st.session_state.get(key, {}).get("selection", {})
    return selection


def _chart(shown: _Shown) -> None:
    st.subheader("Accuracy against cost")
    marked = shown.chosen if shown.chosen and not shown.chosen["current"] else None
    spec = charts.accuracy_by_cost(shown.rows, _PICK, marked)
    spec["config"] = chart_config()
    st.vega_lite_chart(spec, key=shown.chart_key, on_select="rerun", selection_mode=_PICK)
    st.caption(
        "Each point is the best setting with its models, number of folds and views. Click one to see all of these in "
        "the table; with Shift, several. The line joins settings that none beats at the same cost."
    )


def _table(shown: _Shown) -> None:
    title, place = st.columns([3, 1], vertical_alignment="bottom")
    filtered = len(shown.same_cost) < len(shown.rows)
    title.subheader(
        ablation_text.pluralize(len(shown.same_cost), "setting") + (" at the points picked" if filtered else "")
    )
    if filtered:
        place.button("Show all", icon=":material/close:", width="stretch", on_click=_clear)
    st.dataframe(
        _cells(shown.same_cost),
        key=shown.table_key,
        on_select="rerun",
        selection_mode="single-row",
        hide_index=True,
        height=35 * min(len(shown.same_cost), 9) + 38,
        column_config=_ABLATION_COLUMNS,
    )
    st.caption("Click a row to mark it in the chart and to see the images on which it does worst.")


def _clear() -> None:
    # What is picked in a chart can't be changed from here, but a chart of another key has nothing picked.
    st.session_state["cleared"] = st.session_state.get("cleared", 0) + 1


_ABLATION_COLUMNS = {
    "now": st.column_config.TextColumn(help="The current setting", width=40, pinned=True),
    "Dice": st.column_config.NumberColumn(format="%.5f", pinned=True),
    "against current": st.column_config.NumberColumn(format="%+.5f"),
    "95 %, from": st.column_config.NumberColumn(format="%+.5f"),
    "to": st.column_config.NumberColumn(format="%+.5f"),
    "threshold": st.column_config.NumberColumn(format="%g"),
    "seconds an image": st.column_config.NumberColumn(format="%.2g"),
    "passes": st.column_config.NumberColumn(help="Forward passes an image"),
}


def _cells(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows as the table shows them; what is empty or the same in all is left out."""
    cells = pd.DataFrame(
        {
            "now": rows["current"].map({True: "◆", False: ""}),
            "Dice": rows["dice"],
            "against current": rows["difference"],
            "models": rows["models"].map(_joined),
            "folds": rows["folds"],
            "views": rows["views"].map(_joined),
            "merge": rows["merge"].map(MERGE_TITLES),
            "weights": rows["weights"],
            "threshold": rows["threshold"],
            "seconds an image": rows["seconds"],
            "passes": rows["passes"],
            "95 %, from": rows["low"],
            "to": rows["high"],
            "images better": rows["better"],
            "worse": rows["worse"],
        }
    )
    empty = [name for name in cells if cells[name].isna().all() or (cells[name] == "").all()]
    return cells.drop(columns=empty)


def _show_summary(facts: Mapping[str, Any], split: str) -> None:
    """Say what the numbers show, as the report does."""
    verdict = dict(zip(SPLIT_TITLES, ablation_text.summarize_ablation(facts), strict=True))[split]
    with st.expander(f"In words: {verdict.basis}", icon=":material/notes:"):
        for point in verdict.points:
            setting = f"{escape_markdown(point.setting)}. " if point.setting else ""
            st.markdown(f"**{point.label}.** {setting}{escape_markdown(point.words)}")
        for caution in verdict.cautions:
            st.caption(escape_markdown(caution))
