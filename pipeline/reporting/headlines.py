"""What the submission's own way to a mask scored on cars that its nets never saw: the headlines of the page."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan
from typing import Any

import numpy as np
import pandas as pd

from pipeline.competition.interval import MIN_CLUSTERS, studentized_ci
from pipeline.reporting.tables import SPLIT_TITLES, rows_of_split
from pipeline.reporting.words import format_dice, format_int, pluralize

MERGED = "ensemble"
"""Model of the rows of images.csv where nets of several models, or of held-out cars all nets, are merged."""

_MEANING = {
    "oof": "Every image by the nets of its own fold, which never saw its car.",
    "holdout": "The whole ensemble, on cars that no net trained on.",
    "test": "The submission itself.",
}


@dataclass(frozen=True)
class HeadlineScore:
    """A headline: one Dice, and how far to trust it."""

    title: str
    meaning: str
    dice: str
    interval: str
    """The 95 % interval, or why there is none."""
    basis: str
    """On how many images and cars it rests."""


def rows_as_submitted(images: pd.DataFrame, submission: Mapping[str, Any]) -> pd.DataFrame:
    """Return the rows of images.csv, one an image, whose masks are made as the submission's are, steps included."""
    models = {net.rpartition("/")[0] for net in submission["nets"]}
    out_of_fold = MERGED if len(models) > 1 else models.pop()
    chosen = images["model"] == images["split"].map({"oof": out_of_fold, "holdout": MERGED})
    return images[chosen]


def with_final_dice(doubts: pd.DataFrame, images: pd.DataFrame) -> pd.DataFrame:
    """Return image_disagreement.csv with the final Dice; its own is counted before post-processing."""
    own = images[["split", "image_id", "dice"]]
    return doubts.drop(columns="dice").merge(own, on=["split", "image_id"], how="left", validate="one_to_one")


def headline_scores(images: pd.DataFrame, submission: Mapping[str, Any]) -> list[HeadlineScore]:
    """Return the headlines of the images ``as_submitted``, and that of test cars where it is known."""
    parts = {split: rows_of_split(images, split) for split in SPLIT_TITLES}
    found = [_headline_score(split, rows) for split, rows in parts.items() if len(rows)]
    if "test" in submission:
        reason = "No interval: of the test cars one mean is kept, not the score of each."
        basis = f"{format_int(submission['rows'])} images"
        found.append(
            HeadlineScore("Test cars", _MEANING["test"], format_dice(submission["test"]["dice"]), reason, basis)
        )
    return found


def mean_dice_bounds(rows: pd.DataFrame) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean Dice of rows of images.csv, or None where there are too few cars."""
    by_car = rows.groupby("car")["dice"].agg(["sum", "size"])
    bounds_12 = studentized_ci(by_car[["sum"]].to_numpy(np.float64), by_car["size"].to_numpy(np.int64))
    low, high = np.minimum(bounds_12, 1.0)[0].tolist()
    return None if isnan(low) else (low, high)


def _headline_score(split: str, rows: pd.DataFrame) -> HeadlineScore:
    found = mean_dice_bounds(rows)
    interval = (
        f"95 %: {format_dice(found[0])} to {format_dice(found[1])}"
        if found
        else f"No interval: it takes {MIN_CLUSTERS} cars."
    )
    basis = f"{pluralize(len(rows), 'image')} of {pluralize(rows['car'].nunique(), 'car')}"
    return HeadlineScore(SPLIT_TITLES[split], _MEANING[split], format_dice(float(rows["dice"].mean())), interval, basis)
