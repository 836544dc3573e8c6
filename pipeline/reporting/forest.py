"""Settings compared with the current one: rows of a table, each with its line of a forest plot."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pipeline.reporting import words
from pipeline.reporting.tables import SETTING_COLUMNS

PLOT_WIDTH = 150
"""Of the forest plot, in pixels."""

_MARGIN = 8


@dataclass(frozen=True)
class ComparisonCell:
    """A part of a setting."""

    name: str
    text: str
    changed: bool
    """Whether it is another than in the current setting."""


@dataclass(frozen=True)
class CiMark:
    """A difference in the forest plot, as distances from its left border; without an interval both ends are the dot."""

    dot: float
    low: float
    high: float


@dataclass(frozen=True)
class ComparisonRow:
    """A setting and what it scored."""

    label: str
    cells: Sequence[ComparisonCell]
    current: bool
    dice: str
    difference: str
    interval: str
    kind: str
    """``better`` or ``worse`` where the interval says so, else ``open``."""
    mark: CiMark
    better: str
    worse: str
    seconds: str
    passes: str


@dataclass(frozen=True)
class ComparisonTable:
    """A table of settings."""

    label: str
    """Head of the first column."""
    heads: Sequence[str]
    lines: Sequence[ComparisonRow]
    timed: bool
    """Whether any of them has a time."""
    nets: str
    """Whose cost it is, if not that of all nets of a setting."""
    zero: float
    """Where the forest plot has its line of no difference."""
    low: str
    high: str
    """Ends of its axis."""


def build_comparison(
    rows: pd.DataFrame, labels: Sequence[str], label: str, current: "pd.Series[Any]"
) -> ComparisonTable:
    """Return the rows as a table; ``current`` is the setting that they are compared with."""
    heads = [name for name in SETTING_COLUMNS if (rows[name] != "").any()]
    ends = pd.concat([rows["difference"], rows["low"], rows["high"], pd.Series([0.0])]).dropna()
    low, high = float(ends.min()), float(ends.max())
    span = (high - low) or 1.0

    def place(value: float) -> float:
        return round(_MARGIN + (value - low) / span * (PLOT_WIDTH - 2 * _MARGIN), 1)

    lines = [
        _line(row, name, heads, current, _mark(row, place))
        for name, row in zip(labels, rows.to_dict("records"), strict=True)
    ]
    return ComparisonTable(
        label=label,
        heads=heads,
        lines=lines,
        timed=bool(rows["seconds"].notna().any()),
        nets=words.PER_FOLD if (rows["split"] == "oof").all() else "",
        zero=place(0.0),
        low=words.format_signed(low),
        high=words.format_signed(high),
    )


def _mark(row: dict[Any, Any], place: Any) -> CiMark:
    dot = place(row["difference"])
    return CiMark(dot, place(row["low"]), place(row["high"])) if words.is_known(row["low"]) else CiMark(dot, dot, dot)


def _line(
    row: dict[Any, Any], label: str, heads: Sequence[str], current: "pd.Series[Any]", mark: CiMark
) -> ComparisonRow:
    sure = words.is_known(row["low"])
    return ComparisonRow(
        label=label,
        cells=[ComparisonCell(name, _cell(name, row[name]), row[name] != current[name]) for name in heads],
        current=row["current"],
        dice=words.format_dice(row["dice"]),
        difference="" if row["current"] else words.format_signed(row["difference"]),
        interval=f"{words.format_signed(row['low'])} to {words.format_signed(row['high'])}"
        if sure and not row["current"]
        else "",
        kind="better" if sure and row["low"] > 0 else "worse" if sure and row["high"] < 0 else "open",
        mark=mark,
        better="" if row["current"] else words.format_int(row["better"]),
        worse="" if row["current"] else words.format_int(row["worse"]),
        seconds=words.format_seconds(row["seconds"]) if words.is_known(row["seconds"]) else "",
        passes=words.format_int(row["passes"]),
    )


def _cell(name: str, value: Any) -> str:
    if name == "threshold":
        return f"{value:g}"
    return " + ".join(value.split()) if name in ("models", "views") else value
