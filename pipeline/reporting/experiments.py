"""Experiments beside the workspace, as a table for the terminal."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from pipeline.reporting.tables import SPLIT_TITLES, rows_of_split

_INDENT = " " * 4


def format_experiments(table: pd.DataFrame, notes: Sequence[str], width: int) -> Iterator[str]:
    """Yield reports/experiments.csv, a part a split, and notes on it, in lines no longer than ``width``.

    Settings are told by what changed; images and passes where they are not the same for all. A split without anything
    beside the workspace is left out.
    """
    for split, title in SPLIT_TITLES.items():
        rows = rows_of_split(table, split)
        if not rows["current"].all():
            yield from [*_table_lines(rows, title, width), ""]
    for note in notes:
        yield from textwrap.wrap(note, width, subsequent_indent="  ", break_on_hyphens=False)


def _table_lines(rows: pd.DataFrame, title: str, width: int) -> Iterator[str]:
    here = rows[rows["current"]].iloc[0]
    yield f"{title}: {here['images']} images of {here['cars']} cars"
    cells = {
        "": rows["name"],
        "Dice": rows["dice"].map("{:.5f}".format),
        "difference": rows["difference"].map("{:+.5f}".format).mask(rows["current"], ""),
    }
    if rows["low"].notna().any():
        bounds = [f"{low:+.5f} to {high:+.5f}" for low, high in zip(rows["low"], rows["high"], strict=True)]
        cells["95 % interval"] = pd.Series(bounds, rows.index).mask(rows["current"] | rows["low"].isna(), "")
    for column in ("better", "worse", "images", "passes"):
        if rows[column].nunique() > 1:
            cells[column] = rows[column].astype(str).mask(rows["current"] & (column in ("better", "worse")), "")
    yield from _aligned(cells, rows["changed"].mask(~rows["current"] & (rows["changed"] == ""), "no setting"), width)


def _aligned(cells: Mapping[str, "pd.Series[str]"], changed: "pd.Series[str]", width: int) -> Iterator[str]:
    """Yield a line a row, with its changes to the right, or below where they find no room there."""
    widths = {title: max(len(title), *map(len, texts)) for title, texts in cells.items()}
    left = sum(widths.values()) + 2 * len(widths)
    below = max((len(word) for words in changed for word in words.split()), default=0) > width - left
    for *texts, last in [(*cells, "" if below else "changed"), *zip(*cells.values(), changed, strict=True)]:
        name, *numbers = (text.rjust(size) for text, size in zip(texts, widths.values(), strict=True))
        indent = _INDENT if below else " " * left
        words = textwrap.wrap(last, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
        row = "  ".join([name.strip().ljust(len(name)), *numbers, ""])
        first = [] if below else words[:1]
        yield (row + "".join(first).lstrip()).rstrip()
        yield from words[len(first) :]
