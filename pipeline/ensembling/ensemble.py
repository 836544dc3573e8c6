"""Merging nets into a mask, in integers: one arithmetic for the submission, the scores and the ablation.

Every way to merge is a table from level to whole number for each net, whose weighted sum is compared with a whole
number. So the same settings give the same mask everywhere, to the pixel.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import ceil, lcm
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipeline.competition.layout import HEIGHT, WIDTH
from pipeline.ensembling.maps import FULL, LevelMap
from pipeline.sections import Distinct, Section

ENSEMBLE = "ensemble"
"""Name, among models, of several merged."""

MergeName = Literal["probability", "logit", "vote"]

_LOGIT_SCALE = 1 << 12
"""Whole numbers a unit of logit: finer than what a step of level, at least 1/64, can tell."""


class EnsembleSettings(Section):
    """Section ``ensemble`` of params.yaml."""

    models: Distinct[str] | None = None
    """Models to merge; None for all active ones."""

    folds: Distinct[int] | None = None
    """Folds to merge; None for all active ones."""

    weights: Mapping[str, Annotated[int, Field(gt=0, le=1_000_000)]] = {}
    """Whole-number weight of a model's nets; 1 where none is given."""

    merge: MergeName = "probability"
    """Mean of probabilities, mean of logits, or majority of masks."""

    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Probability from which on a pixel is car."""


@dataclass(frozen=True)
class Merge:
    """A way to merge nets, whose maps are sums of ``counts`` views and count ``weights`` times.

    Ties are car: a mean that equals the threshold, and a vote that is even.
    """

    name: MergeName
    threshold: float
    counts: tuple[int, ...]
    weights: tuple[int, ...]

    def mask(self, maps: Sequence[LevelMap], height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.bool_]:
        """Return the mask (height, width) of one image from one map of every net, in the order of ``counts``."""
        if tuple(m.count for m in maps) != self.counts:
            raise ValueError(f"maps of {[m.count for m in maps]} views, expected {self.counts}")
        mask_HW = np.zeros((height, width), np.bool_)
        top, left = min(m.top for m in maps), min(m.left for m in maps)
        bottom, right = max(m.box[0].stop for m in maps), max(m.box[1].stop for m in maps)
        # Outside all boxes every level is 0, every table says 0, and no threshold is that low.
        total = np.zeros((bottom - top, right - left), self._dtype)
        for level_map, table in zip(maps, self._tables, strict=True):
            rows, columns = level_map.box
            part = total[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
            np.add(part, self._look_up(table, level_map), out=part, casting="unsafe")
        np.greater_equal(total, self._least, out=mask_HW[top:bottom, left:right])
        return mask_HW

    def _look_up(self, table: NDArray[np.int64] | int, level_map: LevelMap) -> NDArray[np.generic]:
        if isinstance(table, int):
            return level_map.levels if table == 1 else np.multiply(level_map.levels, table, dtype=self._dtype)
        return np.take(table.astype(self._dtype), level_map.levels)  # in half the time of an index

    @cached_property
    def _raw(self) -> tuple[list[NDArray[np.int64] | int], int]:
        """Tables, a factor standing for a straight one, and the least sum that is car."""
        threshold, total = Fraction(str(self.threshold)), sum(self.weights)
        if self.name == "probability":
            common = lcm(*self.counts)
            factors = [weight * (common // count) for weight, count in zip(self.weights, self.counts, strict=True)]
            return [*factors], ceil(threshold * FULL * common * total)
        if self.name == "vote":
            votes = [
                w * (_levels(n) >= ceil(threshold * FULL * n)) for w, n in zip(self.weights, self.counts, strict=True)
            ]
            return [*votes], ceil(Fraction(total, 2))
        logits = [w * _logit_table(count) for w, count in zip(self.weights, self.counts, strict=True)]
        least = ceil(_logit(float(threshold)) * _LOGIT_SCALE * total)
        # Moved up so that level 0 is 0, as outside the boxes.
        tables = [table - table[0] for table in logits]
        moved = least - sum(int(table[0]) for table in logits)
        # Certain stays certain, whichever way, at thresholds finer than the levels too.
        return [*tables], min(max(1, moved), sum(int(table[-1]) for table in tables))

    @property
    def _tables(self) -> list[NDArray[np.int64] | int]:
        return self._raw[0]

    @property
    def _least(self) -> int:
        return self._raw[1]

    @cached_property
    def _dtype(self) -> type[np.unsignedinteger]:
        """The smallest that holds every sum: half the bytes go by in half the time."""
        highest = sum(
            table * FULL * count if isinstance(table, int) else int(table[-1])
            for table, count in zip(self._tables, self.counts, strict=True)
        )
        return next(t for t in (np.uint16, np.uint32, np.uint64) if max(highest, self._least) <= np.iinfo(t).max)


def _levels(count: int) -> NDArray[np.int64]:
    return np.arange(FULL * count + 1)


def _logit(probability: float | NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.log(probability) - np.log1p(-np.asarray(probability)))


def _logit_table(count: int) -> NDArray[np.int64]:
    # Level 0 and the highest stand for what rounds to them, half a step from certainty, not for infinite logits.
    half = 0.5 / (FULL * count)
    probability = np.clip(_levels(count) / (FULL * count), half, 1 - half)
    return np.rint(_logit(probability) * _LOGIT_SCALE).astype(np.int64)
