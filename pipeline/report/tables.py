"""Read the tables in reports/ with their types, and select the rows that the report shows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.errors import CarvanaError

TableRow = Mapping[Any, Any]
"""A row of a table, by column."""

SPLIT_TITLES = {"oof": "Out of fold", "holdout": "Held-out cars"}
"""Titles of the scored splits."""

SETTING_COLUMNS = ("models", "folds", "views", "merge", "weights", "threshold")
"""Columns that define a setting."""

MERGE_TITLES = {
    "mean_probability": "mean of probabilities",
    "mean_logit": "mean of logits",
    "majority_vote": "majority vote",
}

SUSPECT_PIXELS, SUSPECT_SIDE = 500, 10
"""Minimum area and minimum side, in pixels, of a region that is shown as a suspected label error.

500 pixels are about 0.0005 Dice on a car of average size. Narrow strips along outlines are not label errors.
"""

_TEXT_COLUMNS = (
    *("split", "model", "models", "folds", "views", "merge", "weights", "kind", "postprocess"),
    *("image_id", "car", "net"),
)
_BOOL_COLUMNS = ("current", "front")


def read_table(path: Path) -> pd.DataFrame:
    """Return a CSV of an earlier stage: text and bool columns as such, all others float with NaN for empty cells.

    Raises CarvanaError if it cannot be read.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            columns = next(lines, "").strip().split(",")
        dtypes: dict[str, Any] = {
            name: str if name in _TEXT_COLUMNS else bool if name in _BOOL_COLUMNS else float for name in columns
        }
        blank = {name: [""] for name, dtype in dtypes.items() if dtype is float}
        rows: pd.DataFrame = pd.read_csv(path, dtype=dtypes, keep_default_na=False, na_values=blank)
    except (OSError, ValueError) as error:
        raise CarvanaError(f"Cannot read {path} ({error}). Run 'dvc repro' to create it.") from error
    return rows


def rows_of_split(rows: pd.DataFrame, split: str) -> pd.DataFrame:
    """Return the rows of one split."""
    return _where(rows, rows["split"] == split)


def cost_column(rows: pd.DataFrame) -> str:
    """Return the cost column: ``seconds`` if every row has them, else ``passes``."""
    return "seconds" if len(rows) and rows["seconds"].notna().all() else "passes"


def best_at_each_cost(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the best setting for each cost, that is, for each models, number of folds and views.

    Always includes the current setting and the Pareto front.
    """
    same_cost = [rows["models"], rows["folds"].str.count(r"\S+"), rows["views"]]
    best = rows.groupby(same_cost, sort=False)["dice"].idxmax()
    return _where(rows, rows.index.isin(best) | rows["current"] | rows["front"])


def pareto_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the Pareto front, cheapest first, one setting per cost."""
    cost = cost_column(rows)
    return rows[rows["front"]].sort_values([cost, "dice"], ascending=[True, False]).drop_duplicates(cost)


def differs_only_in(rows: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Return the settings that equal the current one in all other columns; empty if no row is current.

    The merge rule and weights of a single net have no effect and are not compared.
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
    """Return the ``wanted`` best settings for each single changed column, which is named in ``changed``."""
    parts = []
    for column in SETTING_COLUMNS:
        # Other models come with other weights.
        others = differs_only_in(rows, *(("models", "weights") if column == "models" else (column,)))
        current = others[others["current"]]
        others = others[~others[column].isin(current[column])]
        parts.append(others.nlargest(wanted, "dice").assign(changed=column))
    return pd.concat(parts)


def best_and_current(rows: pd.DataFrame, wanted: int) -> pd.DataFrame:
    """Return the ``wanted`` settings with the highest Dice, best first, and the current one in its place or last."""
    ranked = rows.assign(rank=rows["dice"].rank(ascending=False, method="min")).sort_values("dice", ascending=False)
    return _where(ranked, (ranked.reset_index().index < wanted) | ranked["current"])


def describe_setting(row: Mapping[Any, Any], columns: Sequence[str] = SETTING_COLUMNS) -> str:
    """Return a setting, or some of its columns, as text."""
    parts = {
        "models": " and ".join(row["models"].split()),
        "folds": f"{'fold' if ' ' not in row['folds'] else 'folds'} {row['folds']}" if row["folds"] else "",
        "views": " + ".join(row["views"].split()),
        "merge": MERGE_TITLES.get(row["merge"], row["merge"]),
        "weights": f"weights {row['weights']}" if row["weights"] else "",
        "threshold": f"threshold {row['threshold']:g}",
    }
    return ", ".join(parts[name] for name in columns if parts[name])


def worst_images(images: pd.DataFrame, wanted: int, per_car: int) -> pd.DataFrame:
    """Return the images with the lowest Dice, lowest first, at most ``per_car`` of one car."""
    ranked = images.sort_values(["dice", "image_id"])
    return ranked[ranked.groupby("car", sort=False).cumcount() < per_car].head(wanted)


def suspected_label_errors(images: pd.DataFrame) -> pd.DataFrame:
    """Return the images with a large region where all nets contradict the label, largest first."""
    broad = images[["height", "width"]].min(axis=1) >= SUSPECT_SIDE
    large = images[broad & (images["suspect"] >= SUSPECT_PIXELS)]
    return large.sort_values(["suspect", "image_id"], ascending=[False, True])


def _where(rows: pd.DataFrame, condition: Any) -> pd.DataFrame:
    selected: pd.DataFrame = rows.loc[condition]
    return selected
