"""Masks as files: black and white, laid over the picture, cut out of it, or as run-length codes."""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.competition import rle
from pipeline.learning.rasters import UInt8Array

BoolArray = NDArray[np.bool_]

_TINT = (40, 220, 120)
"""Color, RGB, of what is car."""

_PARTS = 4
"""Of the tint, in 10 of the picture's color."""

_QUALITY = 92


def mask_png(mask_HW: BoolArray) -> bytes:
    """Return a mask as a PNG of 8 bits: 255 where car, else 0."""
    return _encoded(".png", mask_HW.view(np.uint8) * np.uint8(255))


def cutout_png(image_HWC: UInt8Array, mask_HW: BoolArray) -> bytes:
    """Return what is car as a PNG with transparency; the rest is black, so that the file holds nothing nobody sees."""
    rgba_HWC = np.dstack([image_HWC, mask_HW.view(np.uint8) * np.uint8(255)])
    rgba_HWC[~mask_HW] = 0
    return _encoded(".png", np.asarray(cv2.cvtColor(rgba_HWC, cv2.COLOR_RGBA2BGRA), np.uint8))


def overlay(image_HWC: UInt8Array, mask_HW: BoolArray) -> UInt8Array:
    """Return the picture, uint8 RGB (H, W, 3), with what is car tinted and outlined."""
    tint_HWC = np.zeros_like(image_HWC)
    tint_HWC[:] = _TINT
    mixed_HWC = cv2.addWeighted(image_HWC, 1 - _PARTS / 10, tint_HWC, _PARTS / 10, 0)
    over_HWC = np.where(mask_HW[..., None], mixed_HWC, image_HWC)
    lines, _ = cv2.findContours(mask_HW.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    # As thick on screen whatever the size of the picture, which is shown shrunk.
    cv2.drawContours(over_HWC, lines, -1, _TINT, thickness=max(1, round(max(mask_HW.shape) / 800)))
    return over_HWC


def overlay_jpg(image_HWC: UInt8Array, mask_HW: BoolArray) -> bytes:
    """Return ``overlay`` as a JPEG."""
    over_HWC = np.asarray(cv2.cvtColor(overlay(image_HWC, mask_HW), cv2.COLOR_RGB2BGR), np.uint8)
    return _encoded(".jpg", over_HWC, cv2.IMWRITE_JPEG_QUALITY, _QUALITY)


@dataclass(frozen=True)
class MaskFormat:
    """What can be written a picture."""

    ending: str
    """Of the file, after the picture's name without suffix."""
    encode: Callable[[UInt8Array, BoolArray], bytes]
    """From picture and mask to the file."""


MASK_FORMATS = {
    "mask": MaskFormat("_mask.png", lambda _, mask_HW: mask_png(mask_HW)),
    "overlay": MaskFormat("_overlay.jpg", overlay_jpg),
    "cutout": MaskFormat("_cutout.png", cutout_png),
}


def rle_row(name: str, mask_HW: BoolArray) -> str:
    """Return a picture's row of a CSV in the competition's form, with its line end; odd names are quoted."""
    row = io.StringIO()
    csv.writer(row, lineterminator="\n").writerow([name, rle.encode(mask_HW)])
    return row.getvalue()


def _encoded(suffix: str, picture: UInt8Array, *options: int) -> bytes:
    _, data = cv2.imencode(suffix, picture, options)
    return data.tobytes()
