"""Strict decoding of JPEG images and of masks."""

import io

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.errors import CorruptFileError
from pipeline.utils.arrays import UInt8Array


def decode_jpeg(data: bytes, name: str) -> UInt8Array:
    """Return an image as uint8 RGB, (1280, 1918, 3).

    Raises CorruptFileError for a truncated or corrupt file, whose missing part other readers fill with gray, and for
    one of another size.
    """
    check_jpeg_header(data, name)  # first: a corrupt header may claim gigabytes
    try:
        image_HWC: UInt8Array = simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError as error:
        raise CorruptFileError(
            f"{name} is not a valid JPEG ({error}). Replace it, or set data.on_corrupt: skip."
        ) from error
    return image_HWC


def check_jpeg_header(data: bytes, name: str) -> None:
    """Raise CorruptFileError unless the first bytes of a file are those of a JPEG of 1918 x 1280."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError) as error:  # KeyError: a color space that simplejpeg has no name for
        raise CorruptFileError(f"{name} is not a JPEG ({error}). Replace it.") from error
    _check_shape(name, height, width)


def decode_mask(data: bytes, name: str) -> UInt8Array:
    """Return a GIF or PNG mask as uint8 of 0 and 1, (1280, 1918); raises CorruptFileError if it is not binary."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_shape(name, image.height, image.width)
            gray_HW: UInt8Array = np.asarray(image.convert("L"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise CorruptFileError(
            f"{name} is not a valid mask ({error}). Replace it, or set data.on_corrupt: skip."
        ) from error
    # Foreground is 1 or 255, depending on who wrote the file. Values between are an error.
    highest = gray_HW.max()
    if highest not in (0, 1, 255) or np.any((gray_HW != 0) & (gray_HW != highest)):
        raise CorruptFileError(f"{name} is not binary: a mask has 0 and one other value, 1 or 255. Replace it.")
    mask_HW: UInt8Array = (gray_HW != 0).view(np.uint8)
    return mask_HW


def _check_shape(name: str, height: int, width: int) -> None:
    if (height, width) != (HEIGHT, WIDTH):
        raise CorruptFileError(f"{name} is {width} x {height} pixels, not {WIDTH} x {HEIGHT}. Replace it.")
