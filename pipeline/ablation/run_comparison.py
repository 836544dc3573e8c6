"""Compare runs image by image, also those with nets or views of their own (DVC experiments)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pipeline.ablation.bootstrap import MIN_CLUSTERS, studentized_ci
from pipeline.ablation.search_space import EnsembleConfig
from pipeline.config import ENSEMBLE_NAME, SCORED_SPLITS, ScoredSplit

WORKSPACE = "workspace"
"""Name of the run that all others are compared with."""

COMPARISON_COLUMNS = (
    *("split", "name", "changed", "models", "folds", "views", "merge", "weights", "threshold", "current"),
    *("dice", "difference", "low", "high", "better", "worse", "images", "cars", "passes", "seconds", "disk_bytes"),
)
"""Columns of reports/experiments.csv."""

_SPLIT_LABELS = {"oof": "out of fold", "holdout": "on held-out cars"}


@dataclass(frozen=True)
class ScoredRun:
    """The scores of a run, with the settings that produced them."""

    name: str
    changed: str
    """Settings that differ from the workspace."""
    settings: Mapping[ScoredSplit, EnsembleConfig]
    images: pd.DataFrame
    """Rows of reports/images.csv: split, model, fold, image_id, car, dice."""

    def scores(self, split: ScoredSplit) -> pd.DataFrame:
        """Return car and Dice by image_id for the submission's models; empty if the split was not scored."""
        models = self.settings[split].models
        name = models[0] if split == "oof" and len(models) == 1 else ENSEMBLE_NAME
        rows = self.images[(self.images["split"] == split) & (self.images["model"] == name)]
        return rows.set_index("image_id")[["car", "dice"]]

    @property
    def fold_by_car(self) -> "pd.Series[int]":
        """The fold of every scored car; -1: held out."""
        return self.images.drop_duplicates("car").set_index("car")["fold"]


@dataclass(frozen=True)
class PairedComparison:
    """One row per run and split, best first, and notes for the reader."""

    table: pd.DataFrame
    notes: list[str]


def compare_runs(here: ScoredRun, others: Sequence[ScoredRun]) -> PairedComparison:
    """Compare each run with the workspace, on the images that both have scored.

    Out-of-fold and holdout scores always come from nets that did not train on the car, so runs with different fold
    assignments can be compared too.
    """
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for split in SCORED_SPLITS:
        split_rows = [row for run in (here, *others) if (row := _row(split, here, run, notes))]
        rows += sorted(split_rows, key=lambda row: -row["difference"])
        fewest = min((row["cars"] for row in split_rows), default=MIN_CLUSTERS)
        if fewest < MIN_CLUSTERS:
            cars = f"{fewest} car{'' if fewest == 1 else 's'}"
            notes.append(f"No intervals {_SPLIT_LABELS[split]}: they need at least {MIN_CLUSTERS} cars, found {cars}.")
    notes += _fold_notes(here, others)
    return PairedComparison(pd.DataFrame(rows, columns=list(COMPARISON_COLUMNS)), notes)


def _row(split: ScoredSplit, here: ScoredRun, run: ScoredRun, notes: list[str]) -> dict[str, Any] | None:
    """Return a run's row, or None if no image was scored by both; appends to ``notes`` what was left out."""
    own, theirs = here.scores(split), run.scores(split)
    pairs = theirs.join(own["dice"].rename("here"), how="inner")
    if len(pairs) < max(len(own), len(theirs)):
        basis = f"compared on {len(pairs)} common images ({len(theirs)} scored by the run, {len(own)} by the workspace)"
        notes.append(f"{run.name}, {_SPLIT_LABELS[split]}: {basis if len(pairs) else 'no common images to compare'}.")
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


def _fold_notes(here: ScoredRun, others: Sequence[ScoredRun]) -> Iterator[str]:
    own = here.fold_by_car
    for run in others:
        theirs = run.fold_by_car
        both = own.index.intersection(theirs.index)
        if (own[both] != theirs[both]).any():
            yield (
                f"{run.name}: different fold assignment (folds.csv). Out-of-fold scores are valid in both runs, but "
                "the nets trained on different cars; holdout scores use only the cars held out in both."
            )
