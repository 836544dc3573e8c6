"""Statistics of an ablation: confidence intervals, cost, Pareto front, recommendation, nested selection."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pipeline.ablation.bootstrap import MIN_CLUSTERS, simultaneous_lower_bounds, studentized_ci
from pipeline.ablation.search_space import EnsembleConfig
from pipeline.config import NetId, ScoredSplit

ABLATION_COLUMNS = (
    *("split", "models", "folds", "views", "merge", "weights", "threshold", "current"),
    *("dice", "difference", "low", "high", "better", "worse", "images", "cars"),
    *("passes", "seconds", "cost", "disk_bytes", "front", "kind"),
)
"""Columns of reports/ablation.csv."""

_HOW_TO_GET_INTERVALS = {
    "oof": f"use {MIN_CLUSTERS} or more cars in the active folds",
    "holdout": f"set folds.holdout_cars to {MIN_CLUSTERS} or more",
}

_NO_RECOMMENDATION = dict.fromkeys(["confidence_set_size", "cheapest", "recommended", "reason"])

_NESTED_GROUPS = 10
"""Groups of cars in `AblationStatistics.nested_selection`."""


@dataclass(frozen=True)
class AblationScores:
    """The Dice of all settings on one split."""

    settings: Sequence[EnsembleConfig]
    images: pd.DataFrame
    """One row per image: image_id, car, angle, nets, disagreement, suspect, top, left, height, width."""
    dice_SI: NDArray[np.float64]
    """By setting and image."""
    map_bytes: Mapping[tuple[NetId, str], float]
    """Size of the stored maps in bytes per image, by net and view."""


@dataclass(frozen=True)
class AblationStatistics:
    """Compares the settings of one split. The first is the current one. Means are over images, as on Kaggle."""

    split: ScoredSplit
    scores: AblationScores
    seconds: Mapping[tuple[NetId, str], float]
    """Measured seconds per image, by net and view; some may be missing."""
    tolerance: float | None = None
    """Largest Dice loss accepted for a cheaper setting (95 % confidence); None: any setting in the confidence set."""

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per setting with ``ABLATION_COLUMNS``, the current one first."""
        dice_SI, settings = self.scores.dice_SI, self.scores.settings
        bounds_S2 = self._intervals(self._sums_CS - self._sums_CS[:, :1])
        table = pd.DataFrame([setting.row() for setting in settings]).assign(
            split=self.split,
            current=[index == 0 for index in range(len(settings))],
            dice=self._mean_S,
            difference=self._mean_S - self._mean_S[0],
            low=bounds_S2[:, 0],
            high=bounds_S2[:, 1],
            better=(dice_SI > dice_SI[0]).sum(axis=1),
            worse=(dice_SI < dice_SI[0]).sum(axis=1),
            images=dice_SI.shape[1],
            cars=len(self._images_C),
            passes=[setting.passes for setting in settings],
            seconds=[_total(setting, self.seconds) for setting in settings],
            disk_bytes=[_total(setting, self.scores.map_bytes) for setting in settings],
            kind=[setting.kind for setting in settings],
        )
        # In seconds; in forward passes if any setting has no timing.
        cost_S = table["passes" if table["seconds"].isna().any() else "seconds"].to_numpy(np.float64)
        return table.assign(cost=cost_S, front=pareto_front(cost_S, self._mean_S))[list(ABLATION_COLUMNS)]

    def summary(self) -> dict[str, Any]:
        """Return the split's section of reports/ablation.json."""
        low, high = self._intervals(self._sums_CS[:, :1])[0].tolist()
        current = {"dice": float(self._mean_S[0]), "low": _jsonable(low), "high": _jsonable(min(high, 1.0))}
        return {
            "cars": len(self._images_C),
            "images": self.scores.dice_SI.shape[1],
            "settings": len(self.scores.settings),
            "no_interval": self._why_no_interval(),
            "current": current,
            "best": self._row(self.best),
            **(_NO_RECOMMENDATION if self._why_no_interval() else self._recommendation()),
            "nested_selection": self.nested_selection(),
        }

    @property
    def best(self) -> int:
        """Index of the setting with the highest mean Dice; the current one on a tie."""
        return int(self._mean_S.argmax())

    def confidence_set(self) -> NDArray[np.int64]:
        """Return the indices of settings that are not significantly worse than the best, compared simultaneously."""
        bounds_S = simultaneous_lower_bounds(self._sums_CS[:, [self.best]] - self._sums_CS, self._images_C)
        return np.flatnonzero(~(bounds_S > 0))

    def cheapest(self, candidates: NDArray[np.int64]) -> int:
        """Return the cheapest candidate; on a tie the current setting, else the one with the highest Dice."""
        cost_S = self.table["cost"].to_numpy()
        return int(min(candidates, key=lambda index: (cost_S[index], index > 0, -self._mean_S[index])))

    def recommended(self, candidates: NDArray[np.int64]) -> int:
        """Return the cheapest candidate that loses at most ``tolerance`` against the current setting.

        The loss is bounded with 95 % confidence for all settings at once, since picking a winner picks luck too. With
        few cars, many settings are in the confidence set without being equally good; the tolerance excludes those.
        """
        if self.tolerance is None:
            return self.cheapest(candidates)
        bounds_S = simultaneous_lower_bounds(self._sums_CS - self._sums_CS[:, :1], self._images_C)
        safe = candidates[(bounds_S[candidates] >= -self.tolerance) | (candidates == 0)]
        # If not even the current setting is a candidate, the best one is significantly better.
        return self.cheapest(safe) if len(safe) else self.best

    def nested_selection(self) -> dict[str, Any] | None:
        """Return an estimate of the selection bias: the Dice of the best setting, and the same with nested selection.

        For nested selection, cars are split into groups; each group is scored with the setting that is best on all
        others. None for a single car. There is no interval: every car takes part in the selections, so a bootstrap over
        cars would be too narrow.
        """
        cars = len(self._images_C)
        if cars < 2:
            return None
        nested_C = np.empty(cars)
        groups_C = np.arange(cars) % min(cars, _NESTED_GROUPS)
        for group in range(groups_C.max() + 1):
            scored_C = groups_C == group
            best = (self._sums_CS[~scored_C].sum(axis=0) / self._images_C[~scored_C].sum()).argmax()
            nested_C[scored_C] = self._sums_CS[scored_C, best]
        nested = float(nested_C.sum() / self._images_C.sum())
        return {
            "groups": int(groups_C.max()) + 1,
            "best_dice": float(self._mean_S.max()),
            "nested_dice": nested,
            "difference": nested - float(self._mean_S[0]),
        }

    def _recommendation(self) -> dict[str, Any]:
        candidates = self.confidence_set()
        cheapest, recommended = self.cheapest(candidates), self.recommended(candidates)
        return {
            "confidence_set_size": len(candidates),
            "cheapest": self._row(cheapest) | self._loss(cheapest),
            "recommended": self._row(recommended),
            "reason": self._reason(recommended),
        }

    def _reason(self, recommended: int) -> str:
        if recommended == 0 and self.best == 0:
            return "The current setting is the best."
        if recommended == 0 and self.tolerance is None:
            return "Keep the current setting: no setting in the confidence set is cheaper."
        if recommended == 0:
            return f"Keep the current setting: no cheaper one loses less than {self.tolerance:g} with 95 % confidence."
        row, cost = self.table.iloc[recommended], self.table["cost"]
        interval = f" (95 % CI {row['low']:+.5f} to {row['high']:+.5f})" if row["low"] == row["low"] else ""
        return (
            f"{row['difference']:+.5f}{interval} vs. the current setting, at {row['cost'] / cost[0]:.0%} of its cost."
        )

    def _row(self, index: int) -> dict[str, Any]:
        return {str(name): _jsonable(value) for name, value in self.table.iloc[index].to_dict().items()}

    def _loss(self, index: int) -> dict[str, Any]:
        """Return how far a setting is below the best, and the upper bound of that loss (95 % CI)."""
        low, _ = self._intervals(self._sums_CS[:, [index]] - self._sums_CS[:, [self.best]])[0].tolist()
        return {"loss": float(self._mean_S[self.best] - self._mean_S[index]), "loss_at_most": _jsonable(-low)}

    def _why_no_interval(self) -> str | None:
        cars = len(self._images_C)
        if cars >= MIN_CLUSTERS:
            return None
        return (
            f"{cars} {'car is' if cars == 1 else 'cars are'} too few for confidence intervals: "
            f"{_HOW_TO_GET_INTERVALS[self.split]} and run 'dvc repro'."
        )

    def _intervals(self, sums_CK: NDArray[np.float64]) -> NDArray[np.float64]:
        return studentized_ci(sums_CK, self._images_C)

    @cached_property
    def _mean_S(self) -> NDArray[np.float64]:
        return np.asarray(self.scores.dice_SI.mean(axis=1))

    @cached_property
    def _cars(self) -> tuple[NDArray[np.intp], int]:
        codes, names = pd.factorize(self.scores.images["car"], sort=True)
        return codes, len(names)

    @cached_property
    def _images_C(self) -> NDArray[np.int64]:
        return np.bincount(self._cars[0], minlength=self._cars[1])

    @cached_property
    def _sums_CS(self) -> NDArray[np.float64]:
        codes_I, cars = self._cars
        belongs_CI = (np.arange(cars)[:, None] == codes_I).astype(np.float64)
        return np.asarray(belongs_CI @ self.scores.dice_SI.T)


def pareto_front(cost_S: NDArray[np.float64], dice_S: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return, bool (S,), which settings are on the Pareto front of low cost and high Dice."""
    front_S = np.zeros(len(dice_S), np.bool_)
    highest = -math.inf
    for index in np.lexsort((np.arange(len(dice_S)), -dice_S, cost_S)):
        front_S[index] = dice_S[index] > highest
        highest = max(highest, dice_S[index])
    return front_S


def _total(setting: EnsembleConfig, parts: Mapping[tuple[NetId, str], float]) -> float:
    keys = [(net, view) for net in setting.nets for view in setting.views]
    return round(sum(parts.get(key, math.nan) for key in keys), 9)


def _jsonable(value: Any) -> Any:
    """Return a table cell as a plain JSON value; NaN becomes None."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and math.isnan(value) else value


def best_settings(statistics: AblationStatistics, count: int) -> Sequence[EnsembleConfig]:
    """Return the ``count`` settings with the highest Dice, best first, without the current one."""
    order = np.lexsort((np.arange(len(statistics.scores.settings)), -statistics.table["dice"].to_numpy()))
    return [statistics.scores.settings[index] for index in order if index != 0][:count]
