"""Pixel counts of many settings at once, exactly those that each would get from whole rasters.

Settings share most of their work, so they are walked as trees: a set of views is summed once a net, a merge looks its
table up once a net, and sums over nets grow from those of the setting before. What is left for a threshold is
one comparison.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.ensembling.ensemble import LevelLut, UnsignedArray, apply_lut, level_lut, smallest_dtype
from pipeline.ensembling.grid import EnsembleConfig, NetId
from pipeline.ensembling.undecided import AmbiguousPixels, CertaintyBounds

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
        """Return each setting's Dice, as ``pipeline.competition.metric`` defines it."""
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
