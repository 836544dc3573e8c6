"""Decode JPEG photographs and masks, with strict checks."""

import io
import struct

import numpy as np
import simplejpeg
from PIL import Image, PngImagePlugin

from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.errors import CorruptFileError
from pipeline.utils.arrays import UInt8Array

DECODE_ERRORS = (OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError, EOFError, struct.error)
"""What Pillow and simplejpeg raise for invalid files."""

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
"""Editors write megabytes of history as text; Pillow's limit of 64 MB for all text together stays."""


def decode_jpeg(data: bytes, name: str) -> UInt8Array:
    """Return a photograph as uint8 RGB, (1280, 1918, 3).

    Raises CorruptFileError, which names ``name``, if the file is truncated, otherwise corrupt or of another size. Other
    decoders fill what is missing with gray.
    """
    check_jpeg_header(data, name)  # before decoding, because a corrupt header may claim gigabytes
    try:
        image_HWC: UInt8Array = simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError as error:
        raise CorruptFileError(f"{name} is not a valid JPEG ({error}). Replace it.") from error
    return image_HWC


def check_jpeg_header(data: bytes, name: str) -> None:
    """Raise CorruptFileError unless ``data``, the start of a file, is the header of a JPEG of 1918 x 1280 pixels."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError) as error:  # KeyError: unknown color space
        raise CorruptFileError(f"{name} is not a JPEG ({error}). Replace it.") from error
    _check_shape(name, height, width)


def decode_mask(data: bytes, name: str) -> UInt8Array:
    """Return a GIF or PNG mask as uint8 of 0 and 1, (1280, 1918).

    Raises CorruptFileError, which names ``name``, if the file is not an image of this size or not binary.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_shape(name, image.height, image.width)
            gray_HW: UInt8Array = np.asarray(image.convert("L"))
    except (Image.DecompressionBombError, *DECODE_ERRORS) as error:
        raise CorruptFileError(f"{name} is not a valid mask ({error}). Replace it.") from error
    # Foreground is 1 or 255, depending on the program that wrote the file. A mask has one of them, and 0.
    highest = gray_HW.max()
    if highest not in (0, 1, 255) or np.any((gray_HW != 0) & (gray_HW != highest)):
        raise CorruptFileError(f"{name} is not binary. Expected only 0 and 1, or 0 and 255. Replace it.")
    mask_HW: UInt8Array = (gray_HW != 0).view(np.uint8)
    return mask_HW


def _check_shape(name: str, height: int, width: int) -> None:
    if (height, width) != (HEIGHT, WIDTH):
        raise CorruptFileError(f"{name} is {width} x {height} pixels. Expected {WIDTH} x {HEIGHT}. Replace it.")
