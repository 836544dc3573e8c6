"""The few pixels of an image on which nets and views can differ at all."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import ceil
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.ensembling.maps import MAX_LEVEL, ProbabilityMap

BoxSlices = tuple[slice, slice]

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
