"""Merge probability maps into a mask, in integers.

Every rule maps each net's quantized probability to an integer by a lookup table, sums these with the nets' weights,
and compares the sum with an integer. The submission, the scores and the ablation use the same code, so equal settings
give equal masks, to the pixel.
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
from pipeline.utils.arrays import BoolArray, BoxSlices, UInt8Array, UnsignedArray

_LOGIT_SCALE = 1 << 16
"""Fixed-point scale of logits: about 1,000 units per step of quantized probability near 0.5."""


@dataclass(frozen=True)
class MergedMargin:
    """A merged image before thresholding, inside a bounding box; everything outside the box is background."""

    box: BoxSlices
    """Rows and columns of the image."""
    margin_HW: NDArray[np.float32]
    """Weighted sum minus the smallest foreground sum, divided by the largest sum: -1 to 1, foreground at >= 0."""
    ambiguous_HW: BoolArray
    """Where the sum is neither 0 nor the maximum: some net is uncertain, or nets disagree."""


@dataclass(frozen=True)
class MergeRule:
    """How to merge nets whose maps sum ``counts`` views each and have integer ``weights``.

    Ties count as foreground: a mean equal to the threshold, and an even vote.
    """

    name: MergeName
    threshold: float
    counts: tuple[int, ...]
    weights: tuple[int, ...]

    def mask(self, maps: Sequence[ProbabilityMap], height: int = HEIGHT, width: int = WIDTH) -> BoolArray:
        """Return the mask (height, width) of one image from one map per net, in the order of ``counts``."""
        box, total_HW = self._total(maps, 0, height, width)
        mask_HW = np.zeros((height, width), np.bool_)
        np.greater_equal(total_HW, self.min_positive_sum, out=mask_HW[box])
        return mask_HW

    def probs_u8(self, maps: Sequence[ProbabilityMap], height: int = HEIGHT, width: int = WIDTH) -> UInt8Array:
        """Return the weighted sum scaled to uint8 (height, width), for display; 255: all nets are certain."""
        box, total_HW = self._total(maps, 0, height, width)
        probs_u8_HW = np.zeros((height, width), np.uint8)
        probs_u8_HW[box] = np.rint(total_HW * np.float32(MAX_LEVEL / self._max_sum))
        return probs_u8_HW

    def margin(
        self, maps: Sequence[ProbabilityMap], around: int = 0, height: int = HEIGHT, width: int = WIDTH
    ) -> MergedMargin:
        """Return the merged margin, its box enlarged by ``around`` pixels per side, clipped to the image.

        The sign is exact: `mask` is true where the margin is not negative.
        """
        box, total_HW = self._total(maps, around, height, width)
        margin_HW = np.subtract(total_HW, float(self.min_positive_sum), dtype=np.float64) / self._max_sum
        return MergedMargin(box, margin_HW.astype(np.float32), (total_HW > 0) & (total_HW < self._max_sum))

    def _total(
        self, maps: Sequence[ProbabilityMap], around: int, height: int, width: int
    ) -> tuple[BoxSlices, UnsignedArray]:
        """Return the bounding box of all maps, enlarged by ``around`` pixels, and the weighted sum of all nets in it.

        Outside it every probability is 0, which every table maps to 0, below any threshold.
        """
        if tuple(m.count for m in maps) != self.counts:
            raise ValueError(f"maps sum {[m.count for m in maps]} views, expected {self.counts}")
        top, left = max(0, min(m.top for m in maps) - around), max(0, min(m.left for m in maps) - around)
        bottom = min(height, max(m.box[0].stop for m in maps) + around)
        right = min(width, max(m.box[1].stop for m in maps) + around)
        total = np.zeros((bottom - top, right - left), self.dtype)
        for prob_map, table, weight in zip(maps, self.tables, self.weights, strict=True):
            rows, columns = prob_map.box
            part = total[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
            np.add(part, apply_lut(prob_map.probs_u8, table * weight, self.dtype), out=part, casting="unsafe")
        return (slice(top, bottom), slice(left, right)), total

    @cached_property
    def tables(self) -> tuple["LevelLut", ...]:
        """One lookup table per net, without its weight: 0 at probability 0, never decreasing."""
        common = lcm(*self.counts)
        return tuple(level_lut(self._effective_rule, self.threshold, count, common // count) for count in self.counts)

    @cached_property
    def min_positive_sum(self) -> int:
        """The smallest weighted sum that counts as foreground: from 1 to the sum when all nets are certain."""
        threshold, total = Fraction(str(self.threshold)), sum(self.weights)
        if self._effective_rule == "mean_probability":
            return ceil(threshold * MAX_LEVEL * lcm(*self.counts) * total)
        if self._effective_rule == "majority_vote":
            return ceil(Fraction(total, 2))
        # Rounded like the tables, so that a net exactly at the threshold is a tie.
        at_zero = sum(weight * int(_logits(count)[0]) for weight, count in zip(self.weights, self.counts, strict=True))
        # Probabilities 0 and 1 keep their side even if the threshold is closer to 0 or 1 than one quantization step.
        return min(max(1, total * int(_scaled_logit(float(threshold))) - at_zero), self._max_sum)

    @cached_property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smallest unsigned type that holds every sum; memory bandwidth limits the speed."""
        return smallest_dtype(max(self._max_sum, self.min_positive_sum))

    @property
    def _effective_rule(self) -> MergeName:
        # For one net, thresholding its logit equals thresholding its probability, without rounding.
        return "mean_probability" if self.name == "mean_logit" and len(self.counts) == 1 else self.name

    @property
    def _max_sum(self) -> int:
        return sum(
            weight * max_lut_value(table, count)
            for weight, table, count in zip(self.weights, self.tables, self.counts, strict=True)
        )


LevelLut = NDArray[np.int64] | int
"""Maps a sum of quantized probabilities to an integer; an int stands for a linear table of that slope."""


def level_lut(name: MergeName, threshold: float, count: int, factor: int = 1) -> LevelLut:
    """Return the lookup table for a sum of ``count`` views; ``factor`` brings sums of different counts to one scale."""
    if name == "mean_probability":
        return factor
    if name == "majority_vote":
        least = ceil(Fraction(str(threshold)) * MAX_LEVEL * count)
        return (np.arange(MAX_LEVEL * count + 1) >= least).astype(np.int64)
    logits = _logits(count)
    # Shifted so that probability 0 maps to 0, as outside the boxes.
    return np.asarray(logits - logits[0])


def apply_lut(probs: UnsignedArray, table: LevelLut, dtype: type[np.unsignedinteger]) -> UnsignedArray:
    """Return ``table`` applied to each element, in ``dtype``; the input itself where the table is the identity."""
    if isinstance(table, int):
        return probs if table == 1 else np.multiply(probs, table, dtype=dtype)
    return np.take(table.astype(dtype), probs)  # twice as fast as indexing


def max_lut_value(table: LevelLut, count: int) -> int:
    """Return the table's value at probability 1."""
    return table * MAX_LEVEL * count if isinstance(table, int) else int(table[-1])


def smallest_dtype(largest: int) -> type[np.unsignedinteger]:
    """Return the smallest unsigned dtype, of 16 bits or more, that holds ``largest``."""
    return next(t for t in (np.uint16, np.uint32, np.uint64) if largest <= np.iinfo(t).max)


def _logits(count: int) -> NDArray[np.int64]:
    # Quantized 0 and 1 mean "within half a step of certain", so their logits are finite.
    half = 0.5 / (MAX_LEVEL * count)
    return _scaled_logit(np.clip(np.arange(MAX_LEVEL * count + 1) / (MAX_LEVEL * count), half, 1 - half))


def _scaled_logit(probability: float | NDArray[np.float64]) -> NDArray[np.int64]:
    logit = np.log(probability) - np.log1p(-np.asarray(probability))
    return np.asarray(np.rint(logit * _LOGIT_SCALE), np.int64)
