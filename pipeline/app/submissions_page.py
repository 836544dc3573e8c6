"""The Submissions page: the submission log, and how well CV Dice predicts Kaggle's scores."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from pipeline.app.page_parts import chart_config, hide_folders, show_errors
from pipeline.kaggle.ledger import (
    CV_COLUMNS,
    LEDGER_FILE,
    MIN_SUBMISSIONS,
    CvLbCorrelation,
    Ledger,
    LedgerRow,
    cv_lb_correlation,
)

_CV_TITLES = {"holdout_dice": "holdout Dice", "oof_dice": "out-of-fold Dice"}
_SCORES = {"public_score": "public", "private_score": "private"}

_LEDGER_COLUMNS: Mapping[str, Any] = {
    "sent": st.column_config.DatetimeColumn(format="D MMM YYYY, HH:mm"),
    **dict.fromkeys(("held out", "out of fold", "public", "private"), st.column_config.NumberColumn(format="%.5f")),
    "threshold": st.column_config.NumberColumn(format="%g"),
}


def show() -> None:
    """Draw the page."""
    st.title("Submissions")
    with show_errors():
        rows = Ledger(LEDGER_FILE).rows()
        if rows:
            _page(rows)
            return
        st.info(
            "No submissions from this project yet. `carvana submit -m 'what it is' --wait` sends one and logs its "
            "score. Add `--dry-run` to check everything first.",
            icon=":material/info:",
        )


def _page(rows: Sequence[LedgerRow]) -> None:
    st.markdown(
        "Submissions to Kaggle and their scores. The private score decided the competition; the public score uses only "
        "1,200 images."
    )
    table = _cells(rows)
    st.dataframe(
        table,
        hide_index=True,
        column_config=dict(_LEDGER_COLUMNS),
        height=35 * min(len(table), 12) + 38,
        placeholder="",
    )
    st.caption("As of the last `carvana submissions`, which updates the scores from Kaggle. Times are UTC.")
    st.subheader("CV Dice vs. Kaggle score")
    pairs = _pairs(table)
    if pairs.empty:
        st.info(
            "No submission has both a CV Dice and a Kaggle score yet. `carvana submissions` fetches the scores.",
            icon=":material/info:",
        )
        return
    st.markdown("A CV Dice is useful if it rises with the Kaggle score. On the dashed line both are equal.")
    shown = [column for column in CV_COLUMNS if (pairs["cv_column"] == column).any()]
    for column, place in zip(shown, st.columns(len(CV_COLUMNS)), strict=False):
        place.vega_lite_chart(_chart(pairs[pairs["cv_column"] == column], _CV_TITLES[column]), key=f"chart-{column}")
        place.caption(_describe_correlation(rows, column))


def _cells(rows: Sequence[LedgerRow]) -> pd.DataFrame:
    """Return the log as the table shows it, newest first, without empty columns."""
    ledger = pd.DataFrame(rows).iloc[::-1]
    numbers = ledger[[*_CV_TITLES, *_SCORES, "threshold"]].apply(pd.to_numeric, errors="coerce")
    cells = pd.DataFrame(
        {
            "sent": pd.to_datetime(ledger["time_utc"], errors="coerce", utc=True),
            "description": ledger["description"],
            "status": ledger["status"],
            "held out": numbers["holdout_dice"],
            "out of fold": numbers["oof_dice"],
            "public": numbers["public_score"],
            "private": numbers["private_score"],
            "nets": ledger["nets"].map(lambda nets: len(nets.split()) or None),
            "views": ledger["views"].map(lambda views: " + ".join(views.split())),
            "merge": ledger["merge"],
            "threshold": numbers["threshold"],
            "commit": ledger["git_commit"].str[:8],
            "error": ledger["error"].map(hide_folders),
        }
    )
    filled = [name for name in cells if cells[name].notna().any() and (cells[name] != "").any()]
    return cells[list(dict.fromkeys(["sent", "description", *filled]))]


def _pairs(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row per submission, CV Dice and score, where both are known."""
    cv_names = {"held out": "holdout_dice", "out of fold": "oof_dice"}
    parts = [
        table[["description", "sent"]].assign(cv_column=column, dice=table[name], score=table[score], board=score)
        for name, column in cv_names.items()
        for score in _SCORES.values()
        if {name, score} <= set(table)
    ]
    pairs = pd.concat(parts) if parts else pd.DataFrame(columns=["description", "sent", "cv_column", "dice", "score"])
    return pairs.dropna(subset=["dice", "score"])


def _chart(pairs: pd.DataFrame, cv_title: str) -> dict[str, Any]:
    """Return a chart of score against CV Dice, colored by leaderboard, with the line of equality."""
    points = pairs.assign(sent=pairs["sent"].dt.strftime("%Y-%m-%d"))
    ends = [points[["dice", "score"]].min().max(), points[["dice", "score"]].max().min()]
    scale = alt.Scale(zero=False, padding=16)
    x = alt.X("dice:Q", title=cv_title, scale=scale)
    y = alt.Y("score:Q", title="Kaggle score", scale=scale)
    boards = alt.Scale(domain=list(_SCORES.values()))
    color, shape = (kind("board:N", title=None, scale=boards) for kind in (alt.Color, alt.Shape))
    tooltip = [
        alt.Tooltip("description:N"),
        alt.Tooltip("sent:N"),
        alt.Tooltip("board:N", title="score"),
        alt.Tooltip("score:Q", format=".5f", title="Kaggle"),
        alt.Tooltip("dice:Q", format=".5f", title=cv_title),
    ]
    marks = alt.Chart(points).mark_point(filled=True, size=80, opacity=0.85)
    marks = marks.encode(x=x, y=y, color=color, shape=shape, tooltip=tooltip)
    layers = [marks]
    if ends[0] < ends[1]:  # otherwise the line lies outside the chart
        line = alt.Chart(pd.DataFrame({"dice": ends, "score": ends})).mark_line(style="front", strokeDash=[4, 4])
        layers.insert(0, line.encode(x=x, y=y))
    spec: dict[str, Any] = alt.layer(*layers).properties(height=320).to_dict()
    return spec | {"config": chart_config()}


def _describe_correlation(rows: Sequence[LedgerRow], cv_column: str) -> str:
    """Return the correlation of a CV Dice with both Kaggle scores."""
    found = {
        name: correlation
        for score, name in _SCORES.items()
        for correlation in cv_lb_correlation(rows, score)
        if correlation.cv_column == cv_column
    }
    if not found:
        return f"The correlation is shown from {MIN_SUBMISSIONS} scored submissions on."
    parts = (f"{_format_correlation(c)} with the {name} score" for name, c in found.items())
    return f"Correlation of the {_CV_TITLES[cv_column]}: {', '.join(parts)}."


def _format_correlation(found: CvLbCorrelation) -> str:
    if found.correlation is None:
        return "undefined (one of them is constant)"
    return f"{found.correlation:.3f} ({found.submissions} submissions)"
