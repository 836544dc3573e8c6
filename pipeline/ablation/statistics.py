"""What a trial of settings shows, and what it doesn't: differences with intervals, cost, and choices made honestly."""

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
    *(
        "split",
        "models",
        "folds",
        "views",
        "merge",
        "weights",
        "threshold",
        "current",
        "dice",
        "difference",
        "low",
        "high",
    ),
    *("better", "worse", "images", "cars", "passes", "seconds", "cost", "disk_bytes", "front", "kind"),
)
"""Of reports/ablation.csv."""

_MORE = {
    "oof": f"see to {MIN_CLUSTERS} cars or more in the folds that are active",
    "holdout": f"set folds.holdout_cars to {MIN_CLUSTERS} or more",
}

_NO_ADVICE = dict.fromkeys(["indistinguishable", "cheapest", "advice", "advice_words"])

_GROUPS = 10
"""Parts that cars are dealt to, so that each is scored by a choice made on the others."""


@dataclass(frozen=True)
class AblationScores:
    """What all settings scored on one split."""

    settings: Sequence[EnsembleConfig]
    images: pd.DataFrame
    """A row an image: image_id, car, angle, nets, disagreement, suspect, top, left, height, width."""
    dice_SI: NDArray[np.float64]
    """By setting and image."""
    map_bytes: Mapping[tuple[NetId, str], float]
    """Bytes an image of the stored maps, by net and view."""


@dataclass(frozen=True)
class AblationStatistics:
    """A trial, weighed. The first setting is the current one; all means are over images, as Kaggle's."""

    split: ScoredSplit
    trial: AblationScores
    seconds: Mapping[tuple[NetId, str], float]
    """Measured seconds an image, by net and view; some may be missing."""
    tolerance: float | None = None
    """Dice that advice may lose."""

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row a setting, as ``COLUMNS`` name it, the current one first."""
        dice_SI, settings = self.trial.dice_SI, self.trial.settings
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
            disk_bytes=[_total(setting, self.trial.map_bytes) for setting in settings],
            kind=[setting.kind for setting in settings],
        )
        # Seconds, or forward passes where some were not timed.
        cost_S = table["passes" if table["seconds"].isna().any() else "seconds"].to_numpy(np.float64)
        return table.assign(cost=cost_S, front=pareto_front(cost_S, self._mean_S))[list(ABLATION_COLUMNS)]

    def summary(self) -> dict[str, Any]:
        """Return the split's part of reports/ablation.json."""
        low, high = self._intervals(self._sums_CS[:, :1])[0].tolist()
        current = {"dice": float(self._mean_S[0]), "low": _jsonable(low), "high": _jsonable(min(high, 1.0))}
        return {
            "cars": len(self._images_C),
            "images": self.trial.dice_SI.shape[1],
            "settings": len(self.trial.settings),
            "no_interval": self._no_interval(),
            "current": current,
            "best": self._row(self.best),
            **(_NO_ADVICE if self._no_interval() else self._advice()),
            "selection": self.nested_selection(),
        }

    @property
    def best(self) -> int:
        """The setting of the highest mean Dice; the current one, where that is as high."""
        return int(self._mean_S.argmax())

    def confidence_set(self) -> NDArray[np.int64]:
        """Return the settings that are not below the best for sure, all compared at once."""
        ahead_S = simultaneous_lower_bounds(self._sums_CS[:, [self.best]] - self._sums_CS, self._images_C)
        return np.flatnonzero(~(ahead_S > 0))

    def cheapest(self, chosen: NDArray[np.int64]) -> int:
        """Return the cheapest of some settings; of equally cheap ones the current one, else that of the highest Dice.

        What can't be told apart is no reason to change anything.
        """
        cost_S = self.table["cost"].to_numpy()
        return int(min(chosen, key=lambda index: (cost_S[index], index > 0, -self._mean_S[index])))

    def recommended(self, chosen: NDArray[np.int64]) -> int:
        """Return the cheapest of some settings that is sure to lose no more than ``tolerance`` against the current one.

        Sure for all settings at once, since luck would else be picked. With few cars much can't be told apart: that is
        no proof that it is as good.
        """
        if self.tolerance is None:
            return self.cheapest(chosen)
        sure_S = simultaneous_lower_bounds(self._sums_CS - self._sums_CS[:, :1], self._images_C) >= -self.tolerance
        safe = chosen[sure_S[chosen] | (chosen == 0)]
        # Where even the current one is told apart from the best, the best is better for sure.
        return self.cheapest(safe) if len(safe) else self.best

    def nested_selection(self) -> dict[str, Any] | None:
        """Return what choosing the highest Dice gives, read off the cars that chose, and off others.

        Cars are dealt to groups; each is scored by what is best on all others. None for a single car. Without an
        interval: all cars share in the choices, so that resampling them would promise too much.
        """
        cars = len(self._images_C)
        if cars < 2:
            return None
        honest_C = np.empty(cars)
        groups_C = np.arange(cars) % min(cars, _GROUPS)
        for group in range(groups_C.max() + 1):
            scored_C = groups_C == group
            chosen = (self._sums_CS[~scored_C].sum(axis=0) / self._images_C[~scored_C].sum()).argmax()
            honest_C[scored_C] = self._sums_CS[scored_C, chosen]
        honest = float(honest_C.sum() / self._images_C.sum())
        return {
            "groups": int(groups_C.max()) + 1,
            "optimistic": float(self._mean_S.max()),
            "honest": honest,
            "difference": honest - float(self._mean_S[0]),
        }

    def _advice(self) -> dict[str, Any]:
        chosen = self.confidence_set()
        cheapest, advised = self.cheapest(chosen), self.recommended(chosen)
        return {
            "indistinguishable": len(chosen),
            "cheapest": self._row(cheapest) | self._loss(cheapest),
            "advice": self._row(advised),
            "advice_words": self._reason(advised),
        }

    def _reason(self, advised: int) -> str:
        if advised == 0 and self.best == 0:
            return "It is the current setting, and the best."
        if advised == 0 and self.tolerance is None:
            return "Keep the current setting: none is cheaper."
        if advised == 0:
            return f"Keep the current setting: no cheaper one is sure to lose less than {self.tolerance:g} against it."
        row, cost = self.table.iloc[advised], self.table["cost"]
        surely = f" (95 %: {row['low']:+.5f} to {row['high']:+.5f})" if row["low"] == row["low"] else ""
        return (
            f"Against the current setting {row['difference']:+.5f}{surely}, at {row['cost'] / cost[0]:.0%} of its cost."
        )

    def _row(self, index: int) -> dict[str, Any]:
        return {str(name): _jsonable(value) for name, value in self.table.iloc[index].to_dict().items()}

    def _loss(self, index: int) -> dict[str, Any]:
        """Return by how much a setting is below the best, and how much that may be."""
        low, _ = self._intervals(self._sums_CS[:, [index]] - self._sums_CS[:, [self.best]])[0].tolist()
        return {"loss": float(self._mean_S[self.best] - self._mean_S[index]), "loss_at_most": _jsonable(-low)}

    def _no_interval(self) -> str | None:
        cars = len(self._images_C)
        if cars >= MIN_CLUSTERS:
            return None
        return (
            f"{cars} car{'' if cars == 1 else 's'} can't tell how sure a difference is: "
            f"for intervals {_MORE[self.split]} and run 'dvc repro'."
        )

    def _intervals(self, sums_CK: NDArray[np.float64]) -> NDArray[np.float64]:
        return studentized_ci(sums_CK, self._images_C)

    @cached_property
    def _mean_S(self) -> NDArray[np.float64]:
        return np.asarray(self.trial.dice_SI.mean(axis=1))

    @cached_property
    def _cars(self) -> tuple[NDArray[np.intp], int]:
        codes, names = pd.factorize(self.trial.images["car"], sort=True)
        return codes, len(names)

    @cached_property
    def _images_C(self) -> NDArray[np.int64]:
        return np.bincount(self._cars[0], minlength=self._cars[1])

    @cached_property
    def _sums_CS(self) -> NDArray[np.float64]:
        codes_I, cars = self._cars
        belongs_CI = (np.arange(cars)[:, None] == codes_I).astype(np.float64)
        return np.asarray(belongs_CI @ self.trial.dice_SI.T)


def pareto_front(cost_S: NDArray[np.float64], dice_S: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which settings no other beats: in Dice at no higher cost, or in cost at no lower Dice."""
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
    """Return a cell as JSON has it: no NaN, and Python's own kinds of numbers."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and math.isnan(value) else value


def best_settings(verdict: AblationStatistics, wanted: int) -> Sequence[EnsembleConfig]:
    """Return the settings of the highest Dice, best first, without the current one."""
    order = np.lexsort((np.arange(len(verdict.trial.settings)), -verdict.table["dice"].to_numpy()))
    return [verdict.trial.settings[index] for index in order if index != 0][:wanted]
