"""Merging nets into a mask, in integers: one arithmetic for the submission, the scores and the ablation.

Every way to merge is a table from level to whole number for each net, whose weighted sum is compared with a whole
number. So the same settings give the same mask everywhere, to the pixel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import ceil, lcm

import numpy as np
from numpy.typing import NDArray

from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.config import MergeName
from pipeline.inference.probability_map import MAX_LEVEL, ProbabilityMap
from pipeline.utils.arrays import UnsignedArray

_LOGIT_SCALE = 1 << 16
"""Whole numbers a unit of logit: a thousand for each step of level."""


@dataclass(frozen=True)
class MergedMargin:
    """A merged image before it is cut into car and not: a box of the raster, outside of which nothing is car."""

    box: tuple[slice, slice]
    """Rows and columns of the raster."""
    margin_HW: NDArray[np.float32]
    """How far the weighted sum is above the least that is car, in parts of the highest: -1 to 1, car from 0 on."""
    ambiguous_HW: NDArray[np.bool_]
    """Where the sum is neither 0 nor the highest: some net is undecided, or nets differ."""


@dataclass(frozen=True)
class MergeRule:
    """A way to merge nets, whose maps are sums of ``counts`` views and count ``weights`` times.

    Ties are car: a mean that equals the threshold, and a vote that is even.
    """

    name: MergeName
    threshold: float
    counts: tuple[int, ...]
    weights: tuple[int, ...]

    def mask(self, maps: Sequence[ProbabilityMap], height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.bool_]:
        """Return the mask (height, width) of one image from one map of every net, in the order of ``counts``."""
        box, total_HW = self._total(maps, 0, height, width)
        mask_HW = np.zeros((height, width), np.bool_)
        np.greater_equal(total_HW, self.min_positive_sum, out=mask_HW[box])
        return mask_HW

    def levels(self, maps: Sequence[ProbabilityMap], height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
        """Return what ``mask`` cuts, the weighted sum, for people to see: 0 to 255, where all nets are certain."""
        box, total_HW = self._total(maps, 0, height, width)
        levels_HW = np.zeros((height, width), np.uint8)
        levels_HW[box] = np.rint(total_HW * np.float32(MAX_LEVEL / self._max_sum))
        return levels_HW

    def margin(
        self, maps: Sequence[ProbabilityMap], around: int = 0, height: int = HEIGHT, width: int = WIDTH
    ) -> MergedMargin:
        """Return what ``mask`` cuts, with ``around`` pixels more on each side, as far as the raster goes.

        The sign is exact: the mask is where the margin is not negative.
        """
        box, total_HW = self._total(maps, around, height, width)
        margin_HW = np.subtract(total_HW, float(self.min_positive_sum), dtype=np.float64) / self._max_sum
        return MergedMargin(box, margin_HW.astype(np.float32), (total_HW > 0) & (total_HW < self._max_sum))

    def _total(
        self, maps: Sequence[ProbabilityMap], around: int, height: int, width: int
    ) -> tuple[tuple[slice, slice], "UnsignedArray"]:
        """Return the weighted sum of all nets, in the box that holds their maps and ``around`` pixels more.

        Outside all maps every level is 0, every table says 0, and no threshold is that low.
        """
        if tuple(m.count for m in maps) != self.counts:
            raise ValueError(f"maps of {[m.count for m in maps]} views, expected {self.counts}")
        top, left = max(0, min(m.top for m in maps) - around), max(0, min(m.left for m in maps) - around)
        bottom = min(height, max(m.box[0].stop for m in maps) + around)
        right = min(width, max(m.box[1].stop for m in maps) + around)
        total = np.zeros((bottom - top, right - left), self.dtype)
        for level_map, table, weight in zip(maps, self.tables, self.weights, strict=True):
            rows, columns = level_map.box
            part = total[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
            np.add(part, apply_lut(level_map.probs_u8, table * weight, self.dtype), out=part, casting="unsafe")
        return (slice(top, bottom), slice(left, right)), total

    @cached_property
    def tables(self) -> tuple["LevelLut", ...]:
        """For each net what its levels are worth, before its weight: 0 at level 0, and never falling."""
        common = lcm(*self.counts)
        return tuple(level_lut(self._effective_rule, self.threshold, count, common // count) for count in self.counts)

    @cached_property
    def min_positive_sum(self) -> int:
        """The least weighted sum that is car: at least 1, and no more than all nets certain give."""
        threshold, total = Fraction(str(self.threshold)), sum(self.weights)
        if self._effective_rule == "mean_probability":
            return ceil(threshold * MAX_LEVEL * lcm(*self.counts) * total)
        if self._effective_rule == "majority_vote":
            return ceil(Fraction(total, 2))
        # Rounded as the tables are, so that a net right at the threshold is a tie.
        at_zero = sum(weight * int(_logits(count)[0]) for weight, count in zip(self.weights, self.counts, strict=True))
        # Certain stays certain, whichever way, at thresholds finer than the levels too.
        return min(max(1, total * int(_scaled_logit(float(threshold))) - at_zero), self._max_sum)

    @cached_property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smallest that holds every sum: half the bytes go by in half the time."""
        return smallest_dtype(max(self._max_sum, self.min_positive_sum))

    @property
    def _effective_rule(self) -> MergeName:
        """One net's mean of logits is its mean of probabilities, unrounded."""
        return "mean_probability" if self.name == "mean_logit" and len(self.counts) == 1 else self.name

    @property
    def _max_sum(self) -> int:
        return sum(
            weight * max_lut_value(table, count)
            for weight, table, count in zip(self.weights, self.tables, self.counts, strict=True)
        )


LevelLut = NDArray[np.int64] | int
"""From level to whole number; a factor stands for a straight one."""


def level_lut(name: MergeName, threshold: float, count: int, factor: int = 1) -> LevelLut:
    """Return what the levels of a sum of ``count`` views are worth; ``factor`` brings sums of unlike counts to one."""
    if name == "mean_probability":
        return factor
    if name == "majority_vote":
        least = ceil(Fraction(str(threshold)) * MAX_LEVEL * count)
        return (np.arange(MAX_LEVEL * count + 1) >= least).astype(np.int64)
    logits = _logits(count)
    # Moved up so that level 0 is 0, as outside the boxes.
    return np.asarray(logits - logits[0])


def apply_lut(levels: UnsignedArray, table: LevelLut, dtype: type[np.unsignedinteger]) -> UnsignedArray:
    """Return what each level is worth, in ``dtype``, or the very levels where that is what they are worth."""
    if isinstance(table, int):
        return levels if table == 1 else np.multiply(levels, table, dtype=dtype)
    return np.take(table.astype(dtype), levels)  # in half the time of an index


def max_lut_value(table: LevelLut, count: int) -> int:
    """Return what a certain pixel is worth."""
    return table * MAX_LEVEL * count if isinstance(table, int) else int(table[-1])


def smallest_dtype(most: int) -> type[np.unsignedinteger]:
    """Return the smallest unsigned dtype that holds ``most``."""
    return next(t for t in (np.uint16, np.uint32, np.uint64) if most <= np.iinfo(t).max)


def _logits(count: int) -> NDArray[np.int64]:
    # Level 0 and the highest stand for what rounds to them, half a step from certainty, not for infinite logits.
    half = 0.5 / (MAX_LEVEL * count)
    return _scaled_logit(np.clip(np.arange(MAX_LEVEL * count + 1) / (MAX_LEVEL * count), half, 1 - half))


def _scaled_logit(probability: float | NDArray[np.float64]) -> NDArray[np.int64]:
    logit = np.log(probability) - np.log1p(-np.asarray(probability))
    return np.asarray(np.rint(logit * _LOGIT_SCALE), np.int64)
