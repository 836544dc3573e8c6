"""The tables of settings that stage ablate writes: read with the types they were written with, and cut for the page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.errors import CarvanaError

TableRow = Mapping[Any, Any]
"""A row of a report's table, by column."""

SPLIT_TITLES = {"oof": "Out of fold", "holdout": "Held-out cars"}
"""Splits of cars with masks that no scoring net learned from, by the words for them."""

SETTING_COLUMNS = ("models", "folds", "views", "merge", "weights", "threshold")
"""Columns that make a setting."""

MERGE_TITLES = {
    "mean_probability": "mean of probabilities",
    "mean_logit": "mean of logits",
    "majority_vote": "majority_vote",
}

SUSPECT_PIXELS, SUSPECT_SIDE = 500, 10
"""Smallest region that is shown as a suspected error of a label, in pixels, and its least height and width.

On a car of usual size 500 pixels are 0.0005 of the image's Dice. Narrow strips lie along outlines.
"""

_TEXTS = (
    *("split", "model", "models", "folds", "views", "merge", "weights", "kind", "postprocess"),
    *("image_id", "car", "net"),
)
_FLAGS = ("current", "front")


def read_table(path: Path) -> pd.DataFrame:
    """Return a CSV of an earlier stage: texts as they stand, flags, and all else as floats, NaN where it is empty.

    Raises CarvanaError if it can't be read.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            columns = next(lines, "").strip().split(",")
        kinds: dict[str, Any] = {name: str if name in _TEXTS else bool if name in _FLAGS else float for name in columns}
        blank = {name: [""] for name, kind in kinds.items() if kind is float}
        rows: pd.DataFrame = pd.read_csv(path, dtype=kinds, keep_default_na=False, na_values=blank)
    except (OSError, ValueError) as error:
        raise CarvanaError(f"{path} can't be read ({error}): run 'dvc repro', which makes it.") from error
    return rows


def rows_of_split(rows: pd.DataFrame, split: str) -> pd.DataFrame:
    """Return the rows of a split."""
    return _where(rows, rows["split"] == split)


def with_cost(rows: pd.DataFrame) -> str:
    """Return the column of cost: measured seconds where every row has them, else forward passes."""
    return "seconds" if len(rows) and rows["seconds"].notna().all() else "passes"


def best_at_each_cost(rows: pd.DataFrame) -> pd.DataFrame:
    """Return of the settings with the same models, number of folds and views, hence the same cost, the best.

    The current one and the front are among them in any case.
    """
    alike = [rows["models"], rows["folds"].str.count(r"\S+"), rows["views"]]
    best = rows.groupby(alike, sort=False)["dice"].idxmax()
    return _where(rows, rows.index.isin(best) | rows["current"] | rows["front"])


def pareto_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the front, cheapest first, one setting a cost."""
    cost = with_cost(rows)
    return rows[rows["front"]].sort_values([cost, "dice"], ascending=[True, False]).drop_duplicates(cost)


def differs_only_in(rows: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Return the rows that are set as the current one in all but these columns; none where no row is current.

    A single net merges with nothing, so that its merge and weights are like any.
    """
    current = rows[rows["current"]]
    if current.empty:
        return current
    single = rows["kind"] == "single net"
    same = [
        (rows[name] == current.iloc[0][name]) | (single & (name in ("merge", "weights")))
        for name in SETTING_COLUMNS
        if name not in columns
    ]
    return _where(rows, pd.concat(same, axis=1).all(axis=1))


def one_factor_changes(rows: pd.DataFrame, wanted: int) -> pd.DataFrame:
    """Return the best few settings that differ from the current one in one column only, which ``changed`` names."""
    parts = []
    for column in SETTING_COLUMNS:
        # Weights are those of models.
        others = differs_only_in(rows, *(("models", "weights") if column == "models" else (column,)))
        current = others[others["current"]]
        others = others[~others[column].isin(current[column])]
        parts.append(others.nlargest(wanted, "dice").assign(changed=column))
    return pd.concat(parts)


def best_and_current(rows: pd.DataFrame, wanted: int) -> pd.DataFrame:
    """Return the settings of the highest Dice, best first, and the current one at its place among them or last."""
    ranked = rows.assign(rank=rows["dice"].rank(ascending=False, method="min")).sort_values("dice", ascending=False)
    return _where(ranked, (ranked.reset_index().index < wanted) | ranked["current"])


def describe_setting(row: Mapping[Any, Any], columns: Sequence[str] = SETTING_COLUMNS) -> str:
    """Return a setting, or some of its columns, as a person would say it."""
    parts = {
        "models": " and ".join(row["models"].split()),
        "folds": f"{'fold' if ' ' not in row['folds'] else 'folds'} {row['folds']}" if row["folds"] else "",
        "views": " + ".join(row["views"].split()),
        "merge": MERGE_TITLES.get(row["merge"], row["merge"]),
        "weights": f"weights {row['weights']}" if row["weights"] else "",
        "threshold": f"threshold {row['threshold']:g}",
    }
    return ", ".join(parts[name] for name in columns if parts[name])


def worst_images(doubts: pd.DataFrame, wanted: int, of_a_car: int) -> pd.DataFrame:
    """Return the images of the lowest Dice, lowest first, only so many of a car."""
    ranked = doubts.sort_values(["dice", "image_id"])
    return ranked[ranked.groupby("car", sort=False).cumcount() < of_a_car].head(wanted)


def suspected_label_errors(doubts: pd.DataFrame) -> pd.DataFrame:
    """Return all images with a large region that speaks against their label, the largest first."""
    broad = doubts[["height", "width"]].min(axis=1) >= SUSPECT_SIDE
    large = doubts[broad & (doubts["suspect"] >= SUSPECT_PIXELS)]
    return large.sort_values(["suspect", "image_id"], ascending=[False, True])


def _where(rows: pd.DataFrame, chosen: Any) -> pd.DataFrame:
    found: pd.DataFrame = rows.loc[chosen]
    return found
