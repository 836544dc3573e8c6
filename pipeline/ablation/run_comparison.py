"""Runs beside each other, image by image: what settings that needed nets or views of their own are worth."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pipeline.ablation.bootstrap import MIN_CLUSTERS, studentized_ci
from pipeline.ablation.search_space import EnsembleConfig
from pipeline.config import ENSEMBLE_NAME, SCORED_SPLITS, ScoredSplit

WORKSPACE = "workspace"
"""Name of the run that the others are compared with."""

COMPARISON_COLUMNS = (
    *("split", "name", "changed", "models", "folds", "views", "merge", "weights", "threshold", "current"),
    *("dice", "difference", "low", "high", "better", "worse", "images", "cars", "passes", "seconds", "disk_bytes"),
)
"""Of reports/experiments.csv: those of reports/ablation.csv that can be told, and which run it is."""

_WHERE = {"oof": "out of fold", "holdout": "held out of all folds"}


@dataclass(frozen=True)
class ScoredRun:
    """Scores, and the settings that they were made with."""

    name: str
    changed: str
    """What is set otherwise than in the workspace."""
    settings: Mapping[ScoredSplit, EnsembleConfig]
    images: pd.DataFrame
    """Of reports/images.csv: split, model, fold, image_id, car, dice."""

    def scores(self, split: ScoredSplit) -> pd.DataFrame:
        """Return car and Dice by image_id, of what the submission is made with; none where nothing was scored."""
        models = self.settings[split].models
        name = models[0] if split == "oof" and len(models) == 1 else ENSEMBLE_NAME
        rows = self.images[(self.images["split"] == split) & (self.images["model"] == name)]
        return rows.set_index("image_id")[["car", "dice"]]

    @property
    def fold_by_car(self) -> "pd.Series[int]":
        """The fold of every car scored, -1 for those held out."""
        return self.images.drop_duplicates("car").set_index("car")["fold"]


@dataclass(frozen=True)
class PairedComparison:
    """A row a run and split, best first, and what a reader should know of them."""

    table: pd.DataFrame
    notes: list[str]


def compare_runs(here: ScoredRun, others: Sequence[ScoredRun]) -> PairedComparison:
    """Compare runs with the one here, on the images that both scored with nets that never saw their cars.

    So are all that count out of fold or as held out, however each run dealt its cars: no more is needed of a pair.
    """
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for split in SCORED_SPLITS:
        found = [row for run in (here, *others) if (row := _row(split, here, run, notes))]
        rows += sorted(found, key=lambda row: -row["difference"])
        fewest = min((row["cars"] for row in found), default=MIN_CLUSTERS)
        if fewest < MIN_CLUSTERS:
            cars = f"{fewest} car{'' if fewest == 1 else 's'}"
            notes.append(
                f"{cars} {_WHERE[split]} can't tell how sure a difference is: an interval needs {MIN_CLUSTERS}."
            )
    notes += _on_dealing(here, others)
    return PairedComparison(pd.DataFrame(rows, columns=list(COMPARISON_COLUMNS)), notes)


def _row(split: ScoredSplit, here: ScoredRun, run: ScoredRun, notes: list[str]) -> dict[str, Any] | None:
    """Return a run's row, or None where there is nothing to compare; ``notes`` gets why, and what is left out."""
    own, theirs = here.scores(split), run.scores(split)
    pairs = theirs.join(own["dice"].rename("here"), how="inner")
    if len(pairs) < max(len(own), len(theirs)):
        basis = f"on the {len(pairs)} images that both scored, of {len(theirs)} there and {len(own)} here"
        notes.append(
            f"{run.name}, {_WHERE[split]}: compared {basis if len(pairs) else 'on none: no image has both scores'}."
        )
    if pairs.empty:
        return None
    difference = pairs["dice"] - pairs["here"]
    by_car = difference.groupby(pairs["car"])
    sums_C1, images_C = by_car.sum().to_numpy()[:, None], by_car.size().to_numpy().astype(np.int64)
    low, high = studentized_ci(sums_C1, images_C)[0].tolist()
    return run.settings[split].row() | {
        "split": split,
        "name": run.name,
        "changed": run.changed,
        "current": run is here,
        "dice": pairs["dice"].mean(),
        "difference": difference.mean(),
        "low": low,
        "high": high,
        "better": int((difference > 0).sum()),
        "worse": int((difference < 0).sum()),
        "images": len(pairs),
        "cars": len(images_C),
        "passes": run.settings[split].passes,
    }


def _on_dealing(here: ScoredRun, others: Sequence[ScoredRun]) -> Iterator[str]:
    own = here.fold_by_car
    for run in others:
        theirs = run.fold_by_car
        both = own.index.intersection(theirs.index)
        if (own[both] != theirs[both]).any():
            yield (
                f"{run.name}: its cars were dealt otherwise (folds.csv). Out of fold each image was new to its nets, "
                "in both runs, though they learned from other cars; held-out scores rest on the cars held out in both."
            )
