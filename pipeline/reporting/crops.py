"""Parts of photographs for the page, enlarged or shrunk, with errors, doubt or outlines drawn over them."""

import base64
from collections.abc import Sequence
from typing import NamedTuple, Self

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.reporting.pictures import FALSE_NEGATIVE, FALSE_POSITIVE, TRUTH, UInt8Array

NETS = (224, 60, 220)
"""Color, RGB, of the nets' outlines where they stand against the truth's."""

REGION = (255, 220, 0)
"""Color, RGB, of the frame around a region."""

_QUALITY = 80
_GAP = 4
_SEEN = 96
"""Part of 255 that must be wrong for a pixel of the picture to be drawn wrong: a single pixel's error must be seen."""


class CropBox(NamedTuple):
    """Rows and columns of a raster; the latter two are the first outside."""

    top: int
    left: int
    bottom: int
    right: int

    @classmethod
    def around(cls, masks: Sequence[NDArray[np.generic]], margin: int) -> Self:
        """Return the box of all that is set in any of the masks with a margin; all of it where nothing is set."""
        any_HW = np.logical_or.reduce(masks)
        rows, columns = np.flatnonzero(any_HW.any(axis=1)), np.flatnonzero(any_HW.any(axis=0))
        if not len(rows):
            return cls(0, 0, *any_HW.shape)
        inner = cls(int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)
        return inner.grown(margin, margin, *any_HW.shape)

    def grown(self, rows: int, columns: int, height: int, width: int) -> Self:
        """Return the box with so much more on each side, cut off at the borders of a raster."""
        top, left = max(0, self.top - rows), max(0, self.left - columns)
        return type(self)(top, left, min(height, self.bottom + rows), min(width, self.right + columns))

    def in_context(self, times: float, least: int, height: int, width: int) -> Self:
        """Return a box ``times`` as high and wide around this one, at least ``least`` high, as 3 to 4 if it can be."""
        rows, columns = self.bottom - self.top, self.right - self.left
        wanted = max(times * rows, 0.75 * times * columns, least)
        return self.grown(round((wanted - rows) / 2), round((wanted / 0.75 - columns) / 2), height, width)

    def cut(self, raster: UInt8Array) -> UInt8Array:
        """Return this part of a raster."""
        return raster[self.top : self.bottom, self.left : self.right]


def crop_photo(image_HWC: UInt8Array, box: CropBox, width: int) -> UInt8Array:
    """Return a part of a photograph, so wide."""
    return _scaled(box.cut(image_HWC), width)


def error_overlay(
    image_HWC: UInt8Array, mask_HW: UInt8Array, true_HW: UInt8Array, box: CropBox, width: int
) -> UInt8Array:
    """Return a part of a photograph with the true outline, what the mask missed, and what it has too much."""
    picture_HWC = crop_photo(image_HWC, box, width)
    _outline(picture_HWC, box.cut(true_HW), TRUTH)
    for wrong_HW, color in ((true_HW & ~mask_HW, FALSE_NEGATIVE), (mask_HW & ~true_HW, FALSE_POSITIVE)):
        picture_HWC[_scaled(box.cut(wrong_HW & np.uint8(1)) * np.uint8(255), width) > _SEEN] = color
    return picture_HWC


def heatmap_overlay(image_HWC: UInt8Array, doubt_HW: UInt8Array, box: CropBox, width: int) -> UInt8Array:
    """Return a part of a photograph, dark and grey, that glows from violet to yellow where ``doubt_HW`` is high."""
    grey_HW = cv2.cvtColor(crop_photo(image_HWC, box, width), cv2.COLOR_RGB2GRAY)
    part_HW = box.cut(doubt_HW)
    # Spread first, or lines of one pixel would fade when shrunk.
    reach = max(1, round(part_HW.shape[1] / width)) + 1
    heat_HW = _scaled(np.asarray(cv2.dilate(part_HW, np.ones((reach, reach), np.uint8)), np.uint8), width)
    colors_HWC = cv2.cvtColor(cv2.applyColorMap(heat_HW, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    share_HW1 = np.sqrt(heat_HW.astype(np.float32) / 255)[..., None]
    mixed_HWC = 0.55 * grey_HW[..., None] * (1 - share_HW1) + colors_HWC * share_HW1
    return np.asarray(np.rint(mixed_HWC), np.uint8)


def with_outlines(
    image_HWC: UInt8Array, true_HW: UInt8Array, nets: Sequence[UInt8Array], box: CropBox, width: int
) -> UInt8Array:
    """Return a part of a photograph with the outlines of the nets' masks, and the true one over them."""
    picture_HWC = crop_photo(image_HWC, box, width)
    for net_HW in nets:
        _outline(picture_HWC, box.cut(net_HW), NETS, thickness=2)
    _outline(picture_HWC, box.cut(true_HW), TRUTH, thickness=2)
    return picture_HWC


def locator(image_HWC: UInt8Array, box: CropBox, width: int) -> UInt8Array:
    """Return the whole photograph, small, with a frame around the box."""
    height_pixels, width_pixels = image_HWC.shape[:2]
    picture_HWC = crop_photo(image_HWC, CropBox(0, 0, height_pixels, width_pixels), width)
    scale = width / width_pixels
    first, last = ((round(x * scale), round(y * scale)) for x, y in ((box.left, box.top), (box.right, box.bottom)))
    cv2.rectangle(picture_HWC, first, last, (255, 255, 255), 4)
    cv2.rectangle(picture_HWC, first, last, NETS, 2)
    return picture_HWC


def with_frame(picture_HWC: UInt8Array, region: CropBox, box: CropBox) -> UInt8Array:
    """Return the picture of a part of a photograph with a thin frame a little outside a region of it."""
    scale = picture_HWC.shape[1] / (box.right - box.left)
    first = round((region.left - box.left) * scale) - _GAP, round((region.top - box.top) * scale) - _GAP
    last = round((region.right - box.left) * scale) + _GAP, round((region.bottom - box.top) * scale) + _GAP
    marked_HWC = picture_HWC.copy()
    cv2.rectangle(marked_HWC, first, last, (0, 0, 0), 4)
    cv2.rectangle(marked_HWC, first, last, REGION, 2)
    return marked_HWC


def data_uri(picture_HWC: UInt8Array) -> str:
    """Return a picture as a JPEG that stands in the page itself."""
    color_at_full_resolution = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)
    options = (cv2.IMWRITE_JPEG_QUALITY, _QUALITY, *color_at_full_resolution)
    data = cv2.imencode(".jpg", cv2.cvtColor(picture_HWC, cv2.COLOR_RGB2BGR), options)[1]
    return jpeg_uri(data.tobytes())


def jpeg_uri(jpeg: bytes) -> str:
    """Return a JPEG as it is, to stand in the page itself."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def _scaled(raster: UInt8Array, width: int) -> UInt8Array:
    rows, columns = raster.shape[:2]
    way = cv2.INTER_AREA if width < columns else cv2.INTER_CUBIC if raster.ndim == 3 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(raster, (width, max(1, round(rows * width / columns))), interpolation=way), np.uint8)


def _outline(picture_HWC: UInt8Array, mask_HW: UInt8Array, color: tuple[int, int, int], thickness: int = 1) -> None:
    inside_HW = (_scaled(mask_HW * np.uint8(255), picture_HWC.shape[1]) >= 128).view(np.uint8)
    # Unlike a contour, the border of what is set has no line where the picture is cut off.
    border_HW = cv2.morphologyEx(inside_HW, cv2.MORPH_GRADIENT, np.ones((thickness + 1, thickness + 1), np.uint8))
    picture_HWC[border_HW > 0] = color
