"""Contact sheets of photographs with outlines."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.files import atomic_write

UInt8Array = NDArray[np.uint8]

_TILE_HEIGHT, _TILE_WIDTH, _CAPTION = 320, 480, 26
_COLUMNS = 4
_JPEG = (
    *(cv2.IMWRITE_JPEG_QUALITY, 88),
    # Color at full resolution: halved, as is usual, it would wash out lines of one pixel.
    *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
)
TRUTH, FALSE_NEGATIVE, FALSE_POSITIVE = (40, 200, 40), (255, 140, 0), (235, 30, 60)
"""Colors, RGB, of the true outline and of errors, in every picture."""
_OUTLINE = (255, 220, 0)


@dataclass(frozen=True)
class SheetTile:
    """A photograph, uint8 RGB (H, W, 3), with masks (H, W) of 0 and 1 and a line of text; no true mask, no error."""

    image: UInt8Array
    mask: UInt8Array
    true: UInt8Array | None
    caption: str


def write_contact_sheet(path: Path, tiles: Sequence[SheetTile], title: str) -> None:
    """Write tiles as one JPEG, four in a row.

    With a true mask its outline is drawn green, missed car orange and false car red; without, the mask's is yellow.
    """
    rows = -(-len(tiles) // _COLUMNS)
    height, width = _CAPTION + max(1, rows) * (_TILE_HEIGHT + _CAPTION), _COLUMNS * _TILE_WIDTH
    sheet_HWC = np.full((height, width, 3), 24, np.uint8)
    _write(sheet_HWC, title, 8, 18)
    for index, tile in enumerate(tiles):
        top = _CAPTION + index // _COLUMNS * (_TILE_HEIGHT + _CAPTION)
        left = index % _COLUMNS * _TILE_WIDTH
        sheet_HWC[top : top + _TILE_HEIGHT, left : left + _TILE_WIDTH] = _draw(tile)
        _write(sheet_HWC, tile.caption, left + 8, top + _TILE_HEIGHT + 18)
    with atomic_write(path) as temporary:
        data = cv2.imencode(".jpg", cv2.cvtColor(sheet_HWC, cv2.COLOR_RGB2BGR), _JPEG)[1]
        temporary.write_bytes(data.tobytes())


def _draw(tile: SheetTile) -> UInt8Array:
    small_HWC = _thumbnail(tile.image)
    if tile.true is None:
        _outline(small_HWC, tile.mask, _OUTLINE)
        return small_HWC
    _outline(small_HWC, tile.true, TRUTH)
    for wrong_HW, color in ((tile.true & ~tile.mask, FALSE_NEGATIVE), (tile.mask & ~tile.true, FALSE_POSITIVE)):
        # A pixel of error is 1/4 of a tile's pixel: draw it where any lies, or it would not be seen.
        seen_HW = _thumbnail((wrong_HW & np.uint8(1)) * np.uint8(255)) > 96
        small_HWC[seen_HW] = color
    return small_HWC


def _thumbnail(raster: UInt8Array) -> UInt8Array:
    return np.asarray(cv2.resize(raster, (_TILE_WIDTH, _TILE_HEIGHT), interpolation=cv2.INTER_AREA), np.uint8)


def _outline(small_HWC: UInt8Array, mask_HW: UInt8Array, color: tuple[int, int, int]) -> None:
    small_HW = _thumbnail(mask_HW * np.uint8(255))
    contours, _ = cv2.findContours((small_HW >= 128).view(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(small_HWC, contours, -1, color, 1)


def _write(sheet_HWC: UInt8Array, text: str, left: int, base: int) -> None:
    cv2.putText(sheet_HWC, text, (left, base), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (235, 235, 235), 1, cv2.LINE_AA)
