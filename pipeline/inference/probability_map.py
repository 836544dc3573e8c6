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
"""Largest uint8 probability of one view: certain foreground."""

MapRow = dict[str, Any]
"""A map as a row of a shard: see ``prediction_store``."""

ZSTD = pa.Codec("zstd", compression_level=1)

UnsignedImage = NDArray[np.uint8] | NDArray[np.uint16]


@dataclass(frozen=True)
class ProbabilityMap:
    """Probabilities of one image from one net, cropped to a box; 0 outside the box."""

    image_id: str
    view: str
    """Name of the view, or the names of the summed views, joined by ``+``."""
    count: int
    """Number of summed views."""
    top: int
    """First row of the box."""
    left: int
    """First column of the box."""
    probs_u8: UnsignedImage
    """Exact sum of ``count`` views of 0 to 255 each: uint8 for one view, uint16 for several."""

    @classmethod
    def crop(cls, image_id: str, view: str, count: int, probs_HW: UnsignedImage) -> Self:
        """Return the map of full-size probabilities (H, W), cropped to the bounding box of what is not zero."""
        left, top, width, height = _bounding_box(probs_HW)
        return cls(image_id, view, count, top, left, probs_HW[top : top + height, left : left + width])

    @classmethod
    def cut(
        cls,
        image_id: str,
        view: str,
        count: int,
        probs_HW: UnsignedImage,
        rows_H: NDArray[np.bool_],
        columns_W: NDArray[np.bool_],
    ) -> Self:
        """Return the map of full-size probabilities (H, W) as ``crop`` does, as a copy.

        ``rows_H`` and ``columns_W`` tell which rows and columns have anything that is not zero.
        """
        rows, columns = np.flatnonzero(rows_H), np.flatnonzero(columns_W)
        if not len(rows):
            return cls(image_id, view, count, 0, 0, probs_HW[:0, :0].copy())
        top, left = int(rows[0]), int(columns[0])
        return cls(image_id, view, count, top, left, probs_HW[top : rows[-1] + 1, left : columns[-1] + 1].copy())

    @property
    def box(self) -> tuple[slice, slice]:
        """Rows and columns of the image that ``probs_u8`` covers."""
        height, width = self.probs_u8.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)

    def to_full_size(self, height: int = HEIGHT, width: int = WIDTH) -> UnsignedImage:
        """Return the full-size probabilities (height, width), in the dtype of ``probs_u8``."""
        probs_HW = np.zeros((height, width), self.probs_u8.dtype)
        probs_HW[self.box] = self.probs_u8
        return probs_HW


@dataclass(frozen=True)
class CompressedMap:
    """A map as stored, so that the thread that uses it can decompress it."""

    row: MapRow

    @property
    def image_id(self) -> str:
        """Id of the image."""
        return str(self.row["image_id"])

    @property
    def view(self) -> str:
        """Name of the view, or the names of the summed views."""
        return str(self.row["view"])

    @property
    def bytes(self) -> int:
        """Compressed size in bytes."""
        return len(self.row["levels"])

    def decompress(self) -> ProbabilityMap:
        """Return the map itself."""
        row = self.row
        shape, dtype = (row["height"], row["width"]), np.dtype(np.uint8 if row["count"] == 1 else np.uint16)
        data = ZSTD.decompress(row["levels"], shape[0] * shape[1] * dtype.itemsize)
        probs: UnsignedImage = np.frombuffer(data, dtype).reshape(shape)
        return ProbabilityMap(row["image_id"], row["view"], row["count"], row["top"], row["left"], probs)


def sum_views(image_id: str, view: str, probs_VHW: NDArray[np.uint8]) -> ProbabilityMap:
    """Return the exact sum of an image's views (V, H, W): uint8 for one view, uint16 for several."""
    if len(probs_VHW) == 1:
        return ProbabilityMap.crop(image_id, view, 1, probs_VHW[0])
    return ProbabilityMap.crop(image_id, view, len(probs_VHW), probs_VHW.sum(axis=0, dtype=np.uint16))


def maps_of_views(
    image_id: str, views: Sequence[str], probs_VHW: NDArray[np.uint8], merged: bool
) -> list[ProbabilityMap]:
    """Return the maps of an image's views (V, H, W): one for each, or one of their sum if ``merged``."""
    if merged:
        return [sum_views(image_id, "+".join(views), probs_VHW)]
    return [ProbabilityMap.crop(image_id, view, 1, probs_HW) for view, probs_HW in zip(views, probs_VHW, strict=True)]


def sum_maps(maps: Sequence[ProbabilityMap]) -> ProbabilityMap:
    """Return the exact sum of maps of one image, in the smallest box that contains them all."""
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


def _bounding_box(probs_HW: UnsignedImage) -> tuple[int, int, int, int]:
    """Return left, top, width and height of the nonzero pixels; width and height are 0 if there are none."""
    if probs_HW.dtype == np.uint16:  # OpenCV accepts 8 bits only
        probs_HW = (probs_HW != 0).view(np.uint8)
    left, top, width, height = cv2.boundingRect(probs_HW)
    return left, top, width, height
