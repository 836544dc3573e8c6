"""Exact Dice of many settings at once: only pixels that some setting decides otherwise are counted again."""

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
"""Level from which a net is certain that a pixel is car; as far from 0 it is certain that it is none."""


class CertaintyBounds(NamedTuple):
    """What decides a pixel whatever the views, nets, weights and merge, for all thresholds of some settings."""

    none: int
    """Level up to which a pixel is no car, if all maps say so."""
    car: int
    """Level from which on it is."""

    @classmethod
    def of(cls, thresholds: Collection[float]) -> "CertaintyBounds":
        """Return the bounds for some thresholds: what all nets and views put on one side of them all, every merge does.

        A level is left between, since a mean of logits is rounded; but all 0 is never car.
        """
        least, most = (ceil(Fraction(str(threshold)) * MAX_LEVEL) for threshold in (min(thresholds), max(thresholds)))
        return cls(none=max(0, least - 2), car=most)


@dataclass(frozen=True)
class AmbiguousPixels:
    """Levels of those pixels of an image that decide between settings, and what the others come to."""

    probs_u8_NVU: NDArray[np.uint8]
    """By net, view and pixel; pixels that are truly car come first."""
    true: int
    """How many of the pixels are truly car."""
    decided: int
    """Pixels of the image that are car under every setting."""
    decided_true: int
    """Those of them that truly are."""
    total_true: int
    """Pixels of the image that truly are car."""


@dataclass(frozen=True)
class LabelConflict:
    """The largest connected region where every net and view is certain and the label says otherwise."""

    pixels: int
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class MapStack:
    """All maps of an image in one box, with its true mask there: what both of the above are read off."""

    probs_u8_MHW: NDArray[np.uint8]
    """Nets times views."""
    true_HW: NDArray[np.uint8]
    """0 and 1. Outside the box nothing is car, neither truly nor for any net."""
    box: BoxSlices
    views: int

    @classmethod
    def of(cls, maps_NV: Sequence[Sequence[ProbabilityMap]], true_HW: NDArray[np.uint8]) -> "MapStack":
        """Return the maps, N nets of V views each, and a mask (H, W) in the smallest box that holds all that is car."""
        maps = [level_map for of_net in maps_NV for level_map in of_net]
        box = _common_box([*(level_map.box for level_map in maps), _box_of(true_HW)])
        rows, columns = box
        levels_MHW = np.zeros((len(maps), rows.stop - rows.start, columns.stop - columns.start), np.uint8)
        for into_HW, level_map in zip(levels_MHW, maps, strict=True):
            y, x = level_map.box
            into_HW[y.start - rows.start : y.stop - rows.start, x.start - columns.start : x.stop - columns.start] = (
                level_map.probs_u8
            )
        return cls(levels_MHW, np.ascontiguousarray(true_HW[box]), box, len(maps_NV[0]))

    def ambiguous_pixels(self, bounds: CertaintyBounds) -> AmbiguousPixels:
        """Return the pixels that decide between settings."""
        least_HW, most_HW = self._range
        decided_HW, true_HW = least_HW >= bounds.car, self.true_HW.view(np.bool_)
        open_HW = ~decided_HW & (most_HW > bounds.none)
        first, then = np.flatnonzero(open_HW & true_HW), np.flatnonzero(open_HW & ~true_HW)
        maps = len(self.probs_u8_MHW)
        levels_MU = np.take(self.probs_u8_MHW.reshape(maps, -1), np.concatenate([first, then]), axis=1)
        return AmbiguousPixels(
            probs_u8_NVU=levels_MU.reshape(maps // self.views, self.views, levels_MU.shape[1]),
            true=len(first),
            decided=int(np.count_nonzero(decided_HW)),
            decided_true=int(np.count_nonzero(decided_HW & true_HW)),
            total_true=int(np.count_nonzero(true_HW)),
        )

    def label_conflict(self) -> LabelConflict:
        """Return where the label is doubted most."""
        least_HW, most_HW = self._range
        car_HW = self.true_HW.view(np.bool_)
        against_HW = ((least_HW >= _CERTAIN) & ~car_HW) | ((most_HW <= MAX_LEVEL - _CERTAIN) & car_HW)
        _, _, stats, _ = cv2.connectedComponentsWithStats(against_HW.view(np.uint8), connectivity=8)
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


_PIXELS_AT_ONCE = 1 << 15
"""What a walk holds in memory stays in a processor's cache."""

K = TypeVar("K", bound=Hashable)

NetWeights = tuple[tuple[int, int], ...]
"""Nets of a sum, as index and weight."""


@dataclass(frozen=True)
class _SumNode:
    path: NetWeights
    limits: Sequence[tuple[int, int]]
    """Index of a setting with the least sum that it calls car."""


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
    """Counts the pixels of settings, which all take their nets and views from the same lists."""

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
        """Return for each setting how many pixels are car in both masks, and in its own, (S, 2)."""
        counts_S2 = np.zeros((self._count, 2), np.int64)
        counts_S2 += (pixels.decided_true, pixels.decided)
        for start in range(0, pixels.probs_u8_NVU.shape[2], _PIXELS_AT_ONCE):
            levels_NVU = pixels.probs_u8_NVU[:, :, start : start + _PIXELS_AT_ONCE]
            true = min(max(pixels.true - start, 0), levels_NVU.shape[2])
            for of_views in self._plan:
                _count(of_views, levels_NVU, true, counts_S2)
        return counts_S2

    def dice(self, pixels: AmbiguousPixels) -> NDArray[np.float64]:
        """Return each setting's Dice, as ``pipeline.competition.dice`` defines it."""
        both_S, own_S = self.count(pixels).T
        whole_S = own_S + pixels.total_true
        return np.asarray(np.divide(2 * both_S, whole_S, out=np.ones(self._count), where=whole_S > 0))


def _merges(group: Sequence[tuple[int, EnsembleConfig]], net_index: Mapping[NetId, int]) -> Iterator[_MergeNode]:
    # The table of a vote depends on the threshold, the others do not.
    def key(setting: EnsembleConfig) -> tuple[str, float | None]:
        return setting.merge, setting.threshold if setting.merge == "majority_vote" else None

    for members in _grouped(group, key).values():
        mergers = {index: setting.merge_rule for index, setting in members}
        paths = _grouped(members, lambda setting: _path(setting, net_index))
        first = mergers[members[0][0]]
        yield _MergeNode(
            table=level_lut(first.name, first.threshold, first.counts[0]),
            dtype=smallest_dtype(max(np.iinfo(merger.dtype).max for merger in mergers.values())),
            sums=[
                _SumNode(path, [(index, mergers[index].min_positive_sum) for index, _ in paths[path]])
                for path in sorted(paths)
            ],
        )


def _path(setting: EnsembleConfig, net_index: Mapping[NetId, int]) -> NetWeights:
    nets = (net_index[net] for net in setting.nets)
    return tuple(sorted(zip(nets, setting.net_weights, strict=True)))


def _count(plan: _ViewNode, levels_NVU: NDArray[np.uint8], true: int, counts_S2: NDArray[np.int64]) -> None:
    summed = {net: _sum_views(levels_NVU[net], plan.views) for net in plan.nets}
    for merge in plan.merges:
        worth = {net: apply_lut(levels_U, merge.table, merge.dtype) for net, levels_U in summed.items()}
        for total_U, limits in _totals(merge, worth):
            for index, least in limits:
                car_U = total_U >= least
                in_both = np.count_nonzero(car_U[:true])
                counts_S2[index] += (in_both, in_both + np.count_nonzero(car_U[true:]))


def _sum_views(levels_VU: NDArray[np.uint8], views: Sequence[int]) -> UnsignedArray:
    return levels_VU[views[0]] if len(views) == 1 else np.asarray(levels_VU[views].sum(axis=0, dtype=np.uint16))


def _totals(
    merge: _MergeNode, worth: Mapping[int, UnsignedArray]
) -> Iterator[tuple[UnsignedArray, Sequence[tuple[int, int]]]]:
    """Yield each sum over nets, grown from what it shares with the one before."""
    path: NetWeights = ()
    totals: list[UnsignedArray] = []
    for wanted in merge.sums:
        shared = _shared(path, wanted.path)
        del totals[shared:]
        for net, weight in wanted.path[shared:]:
            part_U = worth[net] if weight == 1 else np.multiply(worth[net], weight, dtype=merge.dtype)
            totals.append(np.add(totals[-1], part_U, dtype=merge.dtype) if totals else part_U)
        path = wanted.path
        yield totals[-1], wanted.limits


def _shared(one: NetWeights, other: NetWeights) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _grouped(
    members: Sequence[tuple[int, EnsembleConfig]], key: Callable[[EnsembleConfig], K]
) -> dict[K, list[tuple[int, EnsembleConfig]]]:
    groups: dict[K, list[tuple[int, EnsembleConfig]]] = {}
    for index, setting in members:
        groups.setdefault(key(setting), []).append((index, setting))
    return groups
