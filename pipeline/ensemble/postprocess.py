"""Steps between merged maps and a mask: the outline drawn after the photograph, the largest piece, small holes filled.

Measured on 320 real masks of 20 cars, spoiled or as they are, and on the maps of two small nets (160 x 256) of 14 real
cars that these had not seen. docs/design.md has the figures.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.config import PostStep
from pipeline.ensemble.merge import MergedMargin, MergeRule
from pipeline.inference.probability_map import ProbabilityMap
from pipeline.utils.arrays import BoolArray, BoxSlices, Float32Array

ImageLoader = Callable[[str], NDArray[np.uint8]]
"""Photograph, RGB (1280, 1918, 3), by image id."""

RADIUS = 6
"""Pixels from the middle of a window of the filter to its side.

Of 1 to 16: more helps nets that are far off, and harms those that are nearly right.
"""

EPSILON = 1e-3
"""Variance of the grey photograph (0 to 1) that makes half an edge: a standard deviation of 8 in 255.

Of 1e-4 to 1e-2: more changes less, for better and worse. With color in place of grey, a gain of 0.00056 on real nets
is 0.00059, in five times the time.
"""

MAX_HOLE_PIXELS = 64
"""Pixels of the largest hole that is filled: about one pixel of a net at 160 x 256.

166 of the 320 real masks have holes, 18 cars of 20: what is seen behind step bars and under roof racks, 1 to 10,305
pixels, half of them 183 or more. To fill them all would cost perfect masks 0.0008 of Dice on average; to fill those up
to 64 pixels, 0.000015. Of 11 holes that real nets left, those of 12 and 59 pixels were none, and 8 of the others were.
"""

_TILE = 256
"""Height and width of what the filter works on at once, which stays in a processor's cache."""


def no_image(image_id: str) -> NDArray[np.uint8]:
    """Stand in for photographs where no step needs them; raises ValueError."""
    raise ValueError(f"the step edges needs the photograph of {image_id}")


@dataclass(frozen=True)
class MaskBuilder:
    """From the maps of an image to its mask, the one way of scores and submissions: nets merged, then ``steps``.

    The steps are done in the order edges, largest, filled.
    """

    merge: MergeRule
    steps: Collection[PostStep] = ()
    image: ImageLoader = no_image
    """Called for ``edges`` alone; several threads may call at once."""

    def mask(self, maps: Sequence[ProbabilityMap], height: int = HEIGHT, width: int = WIDTH) -> BoolArray:
        """Return the mask (height, width) of one image from one map of every net, in the order of the merge."""
        edged = "refine_edges" in self.steps
        mask_HW = self._with_refined_edges(maps, height, width) if edged else self.merge.mask(maps, height, width)
        if "keep_largest" in self.steps:
            mask_HW = keep_largest_component(mask_HW)
        if "fill_holes" in self.steps:
            mask_HW = fill_small_holes(mask_HW)
        return mask_HW

    def _with_refined_edges(self, maps: Sequence[ProbabilityMap], height: int, width: int) -> BoolArray:
        soft = self.merge.margin(maps, 2 * RADIUS, height, width)
        mask_HW = np.zeros((height, width), np.bool_)
        mask_HW[soft.box] = refine_edges(soft, self.image(maps[0].image_id)[soft.box])
        return mask_HW


def keep_largest_component(mask_HW: BoolArray) -> BoolArray:
    """Return the largest connected piece of a mask alone; of equal ones the first, left to right, then down.

    Not for nets that have hardly learned: their car is in pieces.
    Pixels that touch by their corners are connected: so 2 of the 320 real masks lose 5 pixels, where otherwise 12 lose
    127. Of 119 loose pieces in masks of real nets 2 were car, of 46 and 115 pixels.
    """
    box = _bounding_box(mask_HW)
    labels_HW, stats = _connected_components(mask_HW[box], connectivity=8)
    if len(stats) <= 2:
        return mask_HW
    pixels = stats[:, cv2.CC_STAT_AREA]
    pixels[0] = 0  # those that are not car
    candidates_HW = (pixels == pixels.max())[labels_HW]
    kept_HW = np.zeros_like(mask_HW)
    np.equal(labels_HW, labels_HW.flat[candidates_HW.argmax()], out=kept_HW[box])
    return kept_HW


def fill_small_holes(mask_HW: BoolArray) -> BoolArray:
    """Return a mask with its holes of up to ``LARGEST_HOLE`` pixels filled.

    A hole is background that does not reach the border of the raster. Pixels of it that touch by their corners alone
    are not connected, since those of the car between them are.
    """
    box = _bounding_box(mask_HW)
    # What touches this box from within reaches the border: nothing around it is car.
    labels_HW, stats = _connected_components(~mask_HW[box], connectivity=4)
    left, top, width, height, pixels = stats.T
    inside = (left > 0) & (top > 0) & (left + width < labels_HW.shape[1]) & (top + height < labels_HW.shape[0])
    hole = inside & (pixels <= MAX_HOLE_PIXELS)
    hole[0] = False  # the car
    if not hole.any():
        return mask_HW
    whole_HW = mask_HW.copy()
    whole_HW[box] |= hole[labels_HW]
    return whole_HW


def refine_edges(soft: MergedMargin, image_HWC: NDArray[np.uint8]) -> BoolArray:
    """Return the mask in the box of ``soft``, its outline drawn after the photograph (uint8 RGB) of that box.

    Decided pixels stay as they are. To the margin of the others what the photograph adds is added: see ``detail``.
    A vote decides all pixels on which nets agree, so that of one net nothing changes.
    """
    mask_HW = soft.margin_HW >= 0
    for tile, around in _tiles(soft.ambiguous_HW):
        grey_HW = cv2.cvtColor(image_HWC[around], cv2.COLOR_RGB2GRAY).astype(np.float32) / np.float32(255)
        inner = tuple(slice(t.start - a.start, t.stop - a.start) for t, a in zip(tile, around, strict=True))
        margin_HW = soft.margin_HW[tile] + guided_filter_residual(grey_HW, soft.margin_HW[around])[inner]
        np.greater_equal(margin_HW, 0, out=mask_HW[tile], where=soft.ambiguous_HW[tile])
    return mask_HW


def guided_filter_residual(
    guide_HW: Float32Array, soft_HW: Float32Array, radius: int = RADIUS, epsilon: float = EPSILON
) -> Float32Array:
    """Return what a photograph (grey, 0 to 1) adds to a soft mask, float32 (H, W): nothing where it is even.

    That is the guided filter (He, Sun and Tang, Guided Image Filtering, 2013, algorithm 1) less the same filter of an
    even photograph. By itself the filter smooths the outline too, and rounds off mirrors and aerials, which costs nets
    that are nearly right more than the photograph gives. Windows that reach over the border see the raster mirrored.
    """
    size = (2 * radius + 1, 2 * radius + 1)

    def mean(raster_HW: NDArray[np.floating]) -> Float32Array:
        return np.asarray(cv2.blur(raster_HW, size, borderType=cv2.BORDER_REFLECT), np.float32)

    guide_mean_HW = mean(guide_HW)
    covariance_HW = mean(guide_HW * soft_HW) - guide_mean_HW * mean(soft_HW)
    variance_HW = mean(guide_HW * guide_HW) - guide_mean_HW * guide_mean_HW
    slope_HW = covariance_HW / (variance_HW + np.float32(epsilon))
    return np.asarray(mean(slope_HW) * guide_HW - mean(slope_HW * guide_mean_HW), np.float32)


def _tiles(open_HW: BoolArray) -> Iterator[tuple[BoxSlices, BoxSlices]]:
    """Yield tiles that hold all open pixels, each with the box around it that the filter looks at."""
    rows, columns = _bounding_box(open_HW)
    for top in range(rows.start, rows.stop, _TILE):
        for left in range(columns.start, columns.stop, _TILE):
            tile = slice(top, min(top + _TILE, rows.stop)), slice(left, min(left + _TILE, columns.stop))
            if open_HW[tile].any():
                yield tile, (_widened(tile[0], open_HW.shape[0]), _widened(tile[1], open_HW.shape[1]))


def _widened(part: slice, size: int) -> slice:
    return slice(max(0, part.start - 2 * RADIUS), min(size, part.stop + 2 * RADIUS))


def _bounding_box(mask_HW: BoolArray) -> BoxSlices:
    """Return the smallest box that holds all that is true; an empty one where nothing is."""
    left, top, width, height = cv2.boundingRect(mask_HW.view(np.uint8))
    return slice(top, top + height), slice(left, left + width)


def _connected_components(mask_HW: BoolArray, connectivity: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the number of each pixel's connected piece, 0 for none, and OpenCV's facts by number."""
    if not mask_HW.size:  # of which OpenCV dies
        return np.zeros(mask_HW.shape, np.int32), np.zeros((1, 5), np.int32)
    raster_HW = np.ascontiguousarray(mask_HW).view(np.uint8)
    _, labels_HW, stats, _ = cv2.connectedComponentsWithStats(raster_HW, connectivity=connectivity)
    return np.asarray(labels_HW, np.int32), np.asarray(stats, np.int32)
