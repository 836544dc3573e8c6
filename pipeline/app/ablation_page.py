"""The Ablation page: every setting of the last ablation, as a chart and a table linked by clicks."""

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
    describe_setting,
    rows_of_split,
)
from pipeline.workspace import REPORTS_DIR

_MEANING = {
    "oof": "Each car is scored by the nets of its own fold, which did not train on it.",
    "holdout": "Cars that no net trained on. Only these can score ensembles of several folds.",
}

_SPLITS: Sequence[ScoredSplit] = ("oof", "holdout")

_FILTERS = {"models": "Models", "views": "Views", "merge": "Merge"}

_PICK = "picked"
"""Name of the chart's selection."""


@dataclass(frozen=True)
class _Shown:
    """The content of chart and table after filters and clicks."""

    rows: pd.DataFrame
    """Settings in the chart."""
    same_cost: pd.DataFrame
    """Settings in the table, best first: all, or those with the same cost as the points picked in the chart."""
    chosen: dict[Any, Any] | None
    """The row clicked in the table, else the best of the points picked in the chart."""
    chart_key: str
    table_key: str


def show() -> None:
    """Draw the page."""
    st.title("Ablation")
    if not (REPORTS_DIR / "ablation.csv").is_file():
        st.info(
            "No ablation results yet. Run `carvana repro` in the project folder. If predictions exist already, "
            "`dvc repro ablate` is enough.",
            icon=":material/info:",
        )
        return
    with show_errors():
        _page()


def _page() -> None:
    table, ablation = page_parts.read_report_table("ablation.csv"), page_parts.read_report_json("ablation.json")
    if not {"nets", *_SPLITS} <= ablation.keys():
        raise CarvanaError(
            "reports/ablation.json was written by another version. Run 'dvc repro ablate' to create it again."
        )
    st.markdown("Accuracy and cost of other models, views, folds, merge rules and thresholds.")
    split: ScoredSplit = st.segmented_control(
        "Cars", _SPLITS, format_func=SPLIT_TITLES.__getitem__, default="oof", required=True
    )
    st.caption(_MEANING[split])
    if "skipped" in ablation[split]:
        st.info(escape_markdown(ablation[split]["skipped"]), icon=":material/info:")
        return
    rows = rows_of_split(table, split)
    filtered, name = _filtered(rows, split)
    if filtered.empty:
        st.info("No setting matches all filters. Remove one.", icon=":material/filter_alt_off:")
        return
    shown = _after_clicks(filtered, name)
    _chart(shown)
    _table(shown)
    _show_summary(ablation, split)
    worst_images.show(shown.chosen or rows[rows["current"]].iloc[0].to_dict(), split, ablation)


def _filtered(rows: pd.DataFrame, split: str) -> tuple[pd.DataFrame, str]:
    """Show the filters; return the matching rows, and a key that identifies the filters."""
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
    # The keys identify the rows shown, so that a selection is dropped when these change.
    chart_key = f"chart|{name}|{st.session_state.get('cleared', 0)}"
    points = best_at_each_cost(rows)
    picks = {pick["setting"] for pick in _selection(chart_key).get(_PICK, [])}
    picked = points[points.apply(describe_setting, axis=1).isin(picks)]
    costs = {_cost_key(row) for row in picked.to_dict("records")}
    same_cost = rows[[_cost_key(row) in costs for row in rows.to_dict("records")]] if costs else rows
    same_cost = best_and_current(same_cost, len(same_cost)).reset_index(drop=True)
    table_key = f"table|{chart_key}|{sorted(costs)}"
    clicked = same_cost.iloc[_selection(table_key).get("rows", [])]
    if clicked.empty and costs:
        clicked = same_cost[same_cost.apply(describe_setting, axis=1).isin(picks)]
    chosen = None if clicked.empty else clicked.iloc[0].to_dict()
    return _Shown(rows, same_cost, chosen, chart_key, table_key)


def _cost_key(row: TableRow) -> tuple[str, int, str]:
    """Return what determines a setting's cost, and so its point in the chart."""
    return row["models"], len(row["folds"].split()), row["views"]


def _selection(key: str) -> Mapping[str, Any]:
    """Return the selection in a chart or table, which need not be drawn yet."""
    selection: Mapping[str, Any] = st.session_state.get(key, {}).get("selection", {})
    return selection


def _chart(shown: _Shown) -> None:
    st.subheader("Accuracy vs. cost")
    marked = shown.chosen if shown.chosen and not shown.chosen["current"] else None
    spec = charts.accuracy_by_cost(shown.rows, _PICK, marked)
    spec["config"] = chart_config()
    st.vega_lite_chart(spec, key=shown.chart_key, on_select="rerun", selection_mode=_PICK)
    st.caption(
        "Each point is the best setting with its models, number of folds and views. Click a point to list all of them "
        "in the table; Shift-click to pick several. The line is the Pareto front."
    )


def _table(shown: _Shown) -> None:
    title, place = st.columns([3, 1], vertical_alignment="bottom")
    filtered = len(shown.same_cost) < len(shown.rows)
    title.subheader(
        ablation_text.pluralize(len(shown.same_cost), "setting") + (" at the selected points" if filtered else "")
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
    st.caption("Click a row to mark it in the chart and to see its worst images.")


def _clear() -> None:
    # Streamlit cannot clear a chart's selection, but a chart with a new key starts without one.
    st.session_state["cleared"] = st.session_state.get("cleared", 0) + 1


_ABLATION_COLUMNS = {
    "current": st.column_config.TextColumn(help="The current setting", width=70, pinned=True),
    "Dice": st.column_config.NumberColumn(format="%.5f", pinned=True),
    "vs. current": st.column_config.NumberColumn(format="%+.5f"),
    "95 % CI from": st.column_config.NumberColumn(format="%+.5f"),
    "to": st.column_config.NumberColumn(format="%+.5f"),
    "threshold": st.column_config.NumberColumn(format="%g"),
    "seconds per image": st.column_config.NumberColumn(format="%.2g"),
    "passes": st.column_config.NumberColumn(help="Forward passes per image"),
}


def _cells(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the columns that the table shows; empty columns are left out."""
    cells = pd.DataFrame(
        {
            "current": rows["current"].map({True: "◆", False: ""}),
            "Dice": rows["dice"],
            "vs. current": rows["difference"],
            "models": rows["models"].map(_joined),
            "folds": rows["folds"],
            "views": rows["views"].map(_joined),
            "merge": rows["merge"].map(MERGE_TITLES),
            "weights": rows["weights"],
            "threshold": rows["threshold"],
            "seconds per image": rows["seconds"],
            "passes": rows["passes"],
            "95 % CI from": rows["low"],
            "to": rows["high"],
            "images better": rows["better"],
            "worse": rows["worse"],
        }
    )
    empty = [name for name in cells if cells[name].isna().all() or (cells[name] == "").all()]
    return cells.drop(columns=empty)


def _show_summary(ablation: Mapping[str, Any], split: str) -> None:
    """Show the same summary as the report."""
    summary = dict(zip(SPLIT_TITLES, ablation_text.summarize_ablation(ablation), strict=True))[split]
    with st.expander(f"Summary: {summary.basis}", icon=":material/notes:"):
        for point in summary.points:
            setting = f"{escape_markdown(point.setting)}. " if point.setting else ""
            st.markdown(f"**{point.label}.** {setting}{escape_markdown(point.text)}")
        for warning in summary.warnings:
            st.caption(escape_markdown(warning))
