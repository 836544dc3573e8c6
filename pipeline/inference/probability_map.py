"""Probability maps as cropped uint8 arrays, compressed or not, and their sums over views."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.competition.image_ids import HEIGHT, WIDTH

MAX_LEVEL = 255
"""Level of a certain pixel, in one view."""

MapRow = dict[str, Any]
"""A map as a row of a shard."""

ZSTD = pa.Codec("zstd", compression_level=1)

UnsignedImage = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True)
class ProbabilityMap:
    """Levels of one image from one net: a box of the raster, 0 outside.

    ``levels`` is the exact sum of ``count`` views of 0 to 255 each, uint8 for one view and uint16 for more.
    """

    image_id: str
    view: str
    count: int
    top: int
    left: int
    probs_u8: UnsignedImage

    @classmethod
    def crop(cls, image_id: str, view: str, count: int, levels_HW: UnsignedImage) -> Self:
        """Return the map of a whole raster, cropped to where it is not zero."""
        left, top, width, height = _bounding_box(levels_HW)
        return cls(image_id, view, count, top, left, levels_HW[top : top + height, left : left + width])

    @property
    def box(self) -> tuple[slice, slice]:
        """Rows and columns of the raster that ``levels`` fills."""
        height, width = self.probs_u8.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)

    def to_full_size(self, height: int = HEIGHT, width: int = WIDTH) -> UnsignedImage:
        """Return the whole raster (height, width), of the dtype of ``levels``."""
        levels_HW = np.zeros((height, width), self.probs_u8.dtype)
        levels_HW[self.box] = self.probs_u8
        return levels_HW


@dataclass(frozen=True)
class CompressedMap:
    """A map as it is stored: whoever needs it unpacks it, on a thread of its own if there are many."""

    row: MapRow

    @property
    def image_id(self) -> str:
        """The image that it is of."""
        return str(self.row["image_id"])

    @property
    def view(self) -> str:
        """The view, or the views that were summed."""
        return str(self.row["view"])

    @property
    def bytes(self) -> int:
        """What its levels take on disk."""
        return len(self.row["levels"])

    def decompress(self) -> ProbabilityMap:
        """Return the map itself."""
        row = self.row
        shape, dtype = (row["height"], row["width"]), np.dtype(np.uint8 if row["count"] == 1 else np.uint16)
        data = ZSTD.decompress(row["levels"], shape[0] * shape[1] * dtype.itemsize)
        levels: UnsignedImage = np.frombuffer(data, dtype).reshape(shape)
        return ProbabilityMap(row["image_id"], row["view"], row["count"], row["top"], row["left"], levels)


def sum_views(image_id: str, view: str, levels_VHW: NDArray[np.uint8]) -> ProbabilityMap:
    """Return the exact sum of an image's views (V, H, W), uint8 where there is only one."""
    if len(levels_VHW) == 1:
        return ProbabilityMap.crop(image_id, view, 1, levels_VHW[0])
    return ProbabilityMap.crop(image_id, view, len(levels_VHW), levels_VHW.sum(axis=0, dtype=np.uint16))


def sum_maps(maps: Sequence[ProbabilityMap]) -> ProbabilityMap:
    """Return the exact sum of several maps of one image, in the smallest box that holds them all."""
    if len(maps) == 1:
        return maps[0]
    top, left = min(m.top for m in maps), min(m.left for m in maps)
    bottom, right = max(m.box[0].stop for m in maps), max(m.box[1].stop for m in maps)
    total = np.zeros((bottom - top, right - left), np.uint16)
    for m in maps:
        rows, columns = m.box
        total[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] += m.probs_u8
    view = "+".join(m.view for m in maps)
    return ProbabilityMap(maps[0].image_id, view, sum(m.count for m in maps), top, left, total)


def _bounding_box(levels_HW: UnsignedImage) -> tuple[int, int, int, int]:
    """Return left, top, width and height of what is not zero; zero width and height where nothing is."""
    if levels_HW.dtype == np.uint16:
        # OpenCV takes 8 bits: any set bit of a sum will do.
        levels_HW = (levels_HW != 0).view(np.uint8)
    left, top, width, height = cv2.boundingRect(levels_HW)
    return left, top, width, height
