"""Bytes to pixels: JPEG photographs and GIF masks."""

import io

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.errors import CorruptFileError
from pipeline.utils.arrays import UInt8Array


def decode_jpeg(data: bytes, name: str) -> UInt8Array:
    """Return a photograph as uint8 RGB, (1280, 1918, 3).

    Strict: where other readers fill what is missing with grey, a truncated or corrupt file raises CorruptFileError,
    as does one of another size.
    """
    check_jpeg_header(data, name)  # first: a damaged header may announce gigabytes
    try:
        image_HWC: UInt8Array = simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError as error:
        raise CorruptFileError(f"{name} is not a valid JPEG ({error}): fetch it again.") from error
    return image_HWC


def check_jpeg_header(data: bytes, name: str) -> None:
    """Raise CorruptFileError unless the first bytes of a file announce a JPEG of 1918 x 1280."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError) as error:  # KeyError: a color space that simplejpeg has no name for
        raise CorruptFileError(f"{name} is no JPEG ({error}): fetch it again.") from error
    _check_shape(name, height, width)


def decode_mask(data: bytes, name: str) -> UInt8Array:
    """Return a GIF mask as uint8 of 0 and 1, (1280, 1918); raises CorruptFileError if it has more than two values."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            _check_shape(name, picture.height, picture.width)
            grey_HW: UInt8Array = np.asarray(picture.convert("L"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise CorruptFileError(f"{name} is not a valid mask ({error}): fetch it again.") from error
    # Readers differ in calling a car 1 or 255, and both are fine; anything between is not.
    highest = grey_HW.max()
    if highest not in (0, 1, 255) or np.any((grey_HW != 0) & (grey_HW != highest)):
        raise CorruptFileError(f"{name} is not binary (a mask holds 0 and one other value, 1 or 255): fetch it again.")
    mask_HW: UInt8Array = (grey_HW != 0).view(np.uint8)
    return mask_HW


def _check_shape(name: str, height: int, width: int) -> None:
    if (height, width) != (HEIGHT, WIDTH):
        raise CorruptFileError(f"{name} is {width} x {height} pixels, not {WIDTH} x {HEIGHT}: fetch it again.")
