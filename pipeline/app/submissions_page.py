"""The page Submissions: the ledger, and how far an own Dice foretells Kaggle's scores."""

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

_OWN = {"holdout_dice": "on held-out cars", "oof_dice": "out of fold"}
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
            "Nothing has been sent to Kaggle from this project yet. `carvana submit -m 'what it is' --wait` sends the "
            "submission and notes it, with its score; add `--dry-run` to see whether all is well first.",
            icon=":material/info:",
        )


def _page(rows: Sequence[LedgerRow]) -> None:
    st.markdown(
        "What was sent to Kaggle, and what it scored. The private score is the one that counted; the public one rests "
        "on 1,200 images only."
    )
    table = _cells(rows)
    st.dataframe(
        table,
        hide_index=True,
        column_config=dict(_LEDGER_COLUMNS),
        height=35 * min(len(table), 12) + 38,
        placeholder="",
    )
    st.caption("As of the last `carvana submissions`, which asks Kaggle for fresh scores. Times are UTC.")
    st.subheader("Own Dice against Kaggle's score")
    pairs = _pairs(table)
    if pairs.empty:
        st.info(
            "No submission has both yet, an own Dice and a score. `carvana submissions` fetches the scores.",
            icon=":material/info:",
        )
        return
    st.markdown("What counts is that a higher own Dice means a higher score. On a dashed line both would be equal.")
    shown = [own for own in CV_COLUMNS if (pairs["own"] == own).any()]
    for own, place in zip(shown, st.columns(len(CV_COLUMNS)), strict=False):
        place.vega_lite_chart(_chart(pairs[pairs["own"] == own], _OWN[own]), key=f"chart-{own}")
        place.caption(_agreement(rows, own))


def _cells(rows: Sequence[LedgerRow]) -> pd.DataFrame:
    """Return the ledger as the table shows it, newest first; columns without a word are left out, but the first two."""
    ledger = pd.DataFrame(rows).iloc[::-1]
    numbers = ledger[[*_OWN, *_SCORES, "threshold"]].apply(pd.to_numeric, errors="coerce")
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
    told = [name for name in cells if cells[name].notna().any() and (cells[name] != "").any()]
    return cells[list(dict.fromkeys(["sent", "description", *told]))]


def _pairs(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row a submission, own Dice and score, where both are known."""
    own_names = {"held out": "holdout_dice", "out of fold": "oof_dice"}
    parts = [
        table[["description", "sent"]].assign(own=column, dice=table[own], score=table[score], board=score)
        for own, column in own_names.items()
        for score in _SCORES.values()
        if {own, score} <= set(table)
    ]
    whole = pd.concat(parts) if parts else pd.DataFrame(columns=["description", "sent", "own", "dice", "score"])
    return whole.dropna(subset=["dice", "score"])


def _chart(pairs: pd.DataFrame, own: str) -> dict[str, Any]:
    """Return score against own Dice, a color a board, with the line on which both are equal."""
    points = pairs.assign(sent=pairs["sent"].dt.strftime("%Y-%m-%d"))
    ends = [points[["dice", "score"]].min().max(), points[["dice", "score"]].max().min()]
    scale = alt.Scale(zero=False, padding=16)
    x = alt.X("dice:Q", title=f"own Dice {own}", scale=scale)
    y = alt.Y("score:Q", title="Kaggle's score", scale=scale)
    boards = alt.Scale(domain=list(_SCORES.values()))
    color, shape = (kind("board:N", title=None, scale=boards) for kind in (alt.Color, alt.Shape))
    tooltip = [
        alt.Tooltip("description:N"),
        alt.Tooltip("sent:N"),
        alt.Tooltip("board:N", title="score"),
        alt.Tooltip("score:Q", format=".5f", title="Kaggle"),
        alt.Tooltip("dice:Q", format=".5f", title="own Dice"),
    ]
    marks = alt.Chart(points).mark_point(filled=True, size=80, opacity=0.85)
    marks = marks.encode(x=x, y=y, color=color, shape=shape, tooltip=tooltip)
    layers = [marks]
    if ends[0] < ends[1]:  # else they are nowhere equal
        line = alt.Chart(pd.DataFrame({"dice": ends, "score": ends})).mark_line(style="front", strokeDash=[4, 4])
        layers.insert(0, line.encode(x=x, y=y))
    spec: dict[str, Any] = alt.layer(*layers).properties(height=320).to_dict()
    return spec | {"config": chart_config()}


def _agreement(rows: Sequence[LedgerRow], own: str) -> str:
    """Return how well an own Dice goes with both scores."""
    found = {name: a for score, name in _SCORES.items() for a in cv_lb_correlation(rows, score) if a.cv_column == own}
    if not found:
        return f"How well they go together is told from {MIN_SUBMISSIONS} scored submissions on."
    told = (f"{_correlation(agreement)} with the {name} score" for name, agreement in found.items())
    return f"Correlation of the own Dice {_OWN[own]}: {', '.join(told)}."


def _correlation(agreement: CvLbCorrelation) -> str:
    if agreement.correlation is None:
        return "unknown (one of them never changed)"
    return f"{agreement.correlation:.3f} ({agreement.submissions} submissions)"
