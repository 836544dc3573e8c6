"""Exact Dice of many settings at once: pixels that all settings classify the same way are counted only once."""

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import ceil
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.ablation.search_space import EnsembleConfig
from pipeline.config import NetId
from pipeline.ensemble.merge import LevelLut, apply_lut, level_lut, smallest_dtype
from pipeline.inference.probability_map import MAX_LEVEL, ProbabilityMap
from pipeline.utils.arrays import BoxSlices, UnsignedArray

_CERTAIN = 230
"""Quantized probability from which a net counts as certain of foreground; ``255 - _CERTAIN`` or less: background."""

_PIXELS_AT_ONCE = 1 << 15
"""Chunk size that keeps the working set in the CPU cache."""

K = TypeVar("K", bound=Hashable)

NetWeights = tuple[tuple[int, int], ...]
"""Index and weight of each net in a sum."""


class CertaintyBounds(NamedTuple):
    """Quantized probabilities beyond which a pixel's class does not depend on views, nets, weights and merge rule."""

    background: int
    """If no map exceeds this, the pixel is background."""
    foreground: int
    """If all maps reach this, the pixel is foreground."""

    @classmethod
    def of(cls, thresholds: Collection[float]) -> "CertaintyBounds":
        """Return the bounds for some thresholds.

        One quantization step is left as a margin, as mean_logit rounds. Pixels that are 0 everywhere are background.
        """
        least, most = (ceil(Fraction(str(threshold)) * MAX_LEVEL) for threshold in (min(thresholds), max(thresholds)))
        return cls(background=max(0, least - 2), foreground=most)


@dataclass(frozen=True)
class AmbiguousPixels:
    """The pixels of an image that settings may classify differently, and counts of all other pixels."""

    probs_u8_NVU: NDArray[np.uint8]
    """By net, view and pixel; pixels that are foreground in the label come first."""
    true: int
    """How many of these pixels are foreground in the label."""
    certain: int
    """Pixels of the image that are foreground under every setting."""
    certain_true: int
    """How many of those are foreground in the label."""
    total_true: int
    """Foreground pixels of the label."""


@dataclass(frozen=True)
class LabelConflict:
    """The largest connected region where every net and view is certain and contradicts the label; all 0 if none."""

    pixels: int
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class MapStack:
    """All probability maps of an image, with its true mask, cropped to one box."""

    probs_u8_MHW: NDArray[np.uint8]
    """Nets times views."""
    true_HW: NDArray[np.uint8]
    """0 and 1. Outside the box, the label and every map are 0."""
    box: BoxSlices
    views: int

    @classmethod
    def of(cls, maps_NV: Sequence[Sequence[ProbabilityMap]], true_HW: NDArray[np.uint8]) -> "MapStack":
        """Return the maps of N nets with V views each, and a true mask (H, W), in their common bounding box."""
        maps = [prob_map for net_maps in maps_NV for prob_map in net_maps]
        box = _common_box([*(prob_map.box for prob_map in maps), _box_of(true_HW)])
        rows, columns = box
        probs_MHW = np.zeros((len(maps), rows.stop - rows.start, columns.stop - columns.start), np.uint8)
        for target_HW, prob_map in zip(probs_MHW, maps, strict=True):
            y, x = prob_map.box
            target_HW[y.start - rows.start : y.stop - rows.start, x.start - columns.start : x.stop - columns.start] = (
                prob_map.probs_u8
            )
        return cls(probs_MHW, np.ascontiguousarray(true_HW[box]), box, len(maps_NV[0]))

    def ambiguous_pixels(self, bounds: CertaintyBounds) -> AmbiguousPixels:
        """Return the pixels between the bounds."""
        min_HW, max_HW = self._range
        certain_HW, true_HW = min_HW >= bounds.foreground, self.true_HW.view(np.bool_)
        ambiguous_HW = ~certain_HW & (max_HW > bounds.background)
        positive, negative = np.flatnonzero(ambiguous_HW & true_HW), np.flatnonzero(ambiguous_HW & ~true_HW)
        maps = len(self.probs_u8_MHW)
        probs_MU = np.take(self.probs_u8_MHW.reshape(maps, -1), np.concatenate([positive, negative]), axis=1)
        return AmbiguousPixels(
            probs_u8_NVU=probs_MU.reshape(maps // self.views, self.views, probs_MU.shape[1]),
            true=len(positive),
            certain=int(np.count_nonzero(certain_HW)),
            certain_true=int(np.count_nonzero(certain_HW & true_HW)),
            total_true=int(np.count_nonzero(true_HW)),
        )

    def label_conflict(self) -> LabelConflict:
        """Return the largest region where all maps contradict the label."""
        min_HW, max_HW = self._range
        true_HW = self.true_HW.view(np.bool_)
        conflict_HW = ((min_HW >= _CERTAIN) & ~true_HW) | ((max_HW <= MAX_LEVEL - _CERTAIN) & true_HW)
        _, _, stats, _ = cv2.connectedComponentsWithStats(conflict_HW.view(np.uint8), connectivity=8)
        if len(stats) == 1:
            return LabelConflict(0, 0, 0, 0, 0)
        left, top, width, height, pixels = map(int, stats[1:][stats[1:, cv2.CC_STAT_AREA].argmax()])
        rows, columns = self.box
        return LabelConflict(pixels, rows.start + top, columns.start + left, height, width)

    @cached_property
    def _range(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        return self.probs_u8_MHW.min(axis=0), self.probs_u8_MHW.max(axis=0)


def _box_of(mask_HW: NDArray[np.uint8]) -> BoxSlices:
    left, top, width, height = cv2.boundingRect(mask_HW)
    return slice(top, top + height), slice(left, left + width)


def _common_box(boxes: Sequence[BoxSlices]) -> BoxSlices:
    filled = [box for box in boxes if box[0].stop > box[0].start] or [(slice(0, 1), slice(0, 1))]
    rows, columns = ([box[axis] for box in filled] for axis in (0, 1))
    return (
        slice(min(s.start for s in rows), max(s.stop for s in rows)),
        slice(min(s.start for s in columns), max(s.stop for s in columns)),
    )


@dataclass(frozen=True)
class _SumNode:
    path: NetWeights
    min_sums: Sequence[tuple[int, int]]
    """For each setting that uses this sum: its index, and the smallest sum that counts as foreground."""


@dataclass(frozen=True)
class _MergeNode:
    table: LevelLut
    dtype: type[np.unsignedinteger]
    sums: Sequence[_SumNode]


@dataclass(frozen=True)
class _ViewNode:
    views: list[int]
    nets: list[int]
    merges: Sequence[_MergeNode]


class SettingScorer:
    """Computes the Dice of many settings whose nets and views come from the same lists.

    Work is shared as a tree: settings with the same views share the sums over views, those with the same merge rule
    share lookup tables, and sums over nets reuse the longest common prefix.
    """

    def __init__(self, settings: Sequence[EnsembleConfig], nets: Sequence[NetId], views: Sequence[str]) -> None:
        self.bounds = CertaintyBounds.of({setting.threshold for setting in settings})
        self._count = len(settings)
        net_index = {net: index for index, net in enumerate(nets)}
        view_index = {view: index for index, view in enumerate(views)}
        numbered = list(enumerate(settings))
        self._plan = [
            _ViewNode(
                views=[view_index[view] for view in chosen],
                nets=sorted({net_index[net] for _, setting in group for net in setting.nets}),
                merges=list(_merges(group, net_index)),
            )
            for chosen, group in _grouped(numbered, lambda setting: setting.views).items()
        ]

    def count(self, pixels: AmbiguousPixels) -> NDArray[np.int64]:
        """Return, int64 (S, 2), each setting's true positives and its foreground pixels."""
        counts_S2 = np.zeros((self._count, 2), np.int64)
        counts_S2 += (pixels.certain_true, pixels.certain)
        for start in range(0, pixels.probs_u8_NVU.shape[2], _PIXELS_AT_ONCE):
            probs_NVU = pixels.probs_u8_NVU[:, :, start : start + _PIXELS_AT_ONCE]
            true = min(max(pixels.true - start, 0), probs_NVU.shape[2])
            for node in self._plan:
                _count(node, probs_NVU, true, counts_S2)
        return counts_S2

    def dice(self, pixels: AmbiguousPixels) -> NDArray[np.float64]:
        """Return each setting's Dice, float64 (S,), as defined in ``pipeline.competition.dice``."""
        true_positives_S, positives_S = self.count(pixels).T
        denominator_S = positives_S + pixels.total_true
        return np.asarray(
            np.divide(2 * true_positives_S, denominator_S, out=np.ones(self._count), where=denominator_S > 0)
        )


def _merges(group: Sequence[tuple[int, EnsembleConfig]], net_index: Mapping[NetId, int]) -> Iterator[_MergeNode]:
    # Only the table of majority_vote depends on the threshold.
    def key(setting: EnsembleConfig) -> tuple[str, float | None]:
        return setting.merge, setting.threshold if setting.merge == "majority_vote" else None

    for members in _grouped(group, key).values():
        rules = {index: setting.merge_rule for index, setting in members}
        paths = _grouped(members, lambda setting: _path(setting, net_index))
        first = rules[members[0][0]]
        yield _MergeNode(
            table=level_lut(first.name, first.threshold, first.counts[0]),
            dtype=smallest_dtype(max(np.iinfo(rule.dtype).max for rule in rules.values())),
            sums=[
                _SumNode(path, [(index, rules[index].min_positive_sum) for index, _ in paths[path]])
                for path in sorted(paths)
            ],
        )


def _path(setting: EnsembleConfig, net_index: Mapping[NetId, int]) -> NetWeights:
    nets = (net_index[net] for net in setting.nets)
    return tuple(sorted(zip(nets, setting.net_weights, strict=True)))


def _count(node: _ViewNode, probs_NVU: NDArray[np.uint8], true: int, counts_S2: NDArray[np.int64]) -> None:
    summed = {net: _sum_views(probs_NVU[net], node.views) for net in node.nets}
    for merge in node.merges:
        values = {net: apply_lut(probs_U, merge.table, merge.dtype) for net, probs_U in summed.items()}
        for total_U, min_sums in _totals(merge, values):
            for index, min_positive_sum in min_sums:
                positive_U = total_U >= min_positive_sum
                true_positives = np.count_nonzero(positive_U[:true])
                counts_S2[index] += (true_positives, true_positives + np.count_nonzero(positive_U[true:]))


def _sum_views(probs_VU: NDArray[np.uint8], views: Sequence[int]) -> UnsignedArray:
    return probs_VU[views[0]] if len(views) == 1 else np.asarray(probs_VU[views].sum(axis=0, dtype=np.uint16))


def _totals(
    merge: _MergeNode, values: Mapping[int, UnsignedArray]
) -> Iterator[tuple[UnsignedArray, Sequence[tuple[int, int]]]]:
    """Yield each weighted sum over nets, extending the prefix that it shares with the previous one."""
    path: NetWeights = ()
    totals: list[UnsignedArray] = []
    for node in merge.sums:
        shared = _common_prefix(path, node.path)
        del totals[shared:]
        for net, weight in node.path[shared:]:
            term_U = values[net] if weight == 1 else np.multiply(values[net], weight, dtype=merge.dtype)
            totals.append(np.add(totals[-1], term_U, dtype=merge.dtype) if totals else term_U)
        path = node.path
        yield totals[-1], node.min_sums


def _common_prefix(one: NetWeights, other: NetWeights) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _grouped(
    members: Sequence[tuple[int, EnsembleConfig]], key: Callable[[EnsembleConfig], K]
) -> dict[K, list[tuple[int, EnsembleConfig]]]:
    groups: dict[K, list[tuple[int, EnsembleConfig]]] = {}
    for index, setting in members:
        groups.setdefault(key(setting), []).append((index, setting))
    return groups
