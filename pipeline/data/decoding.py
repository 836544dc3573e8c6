"""Decode JPEG photographs and masks, with strict checks."""

import io
import struct

import numpy as np
import simplejpeg
from PIL import Image

from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.errors import CorruptFileError
from pipeline.utils.arrays import UInt8Array

DECODE_ERRORS = (OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError, EOFError, struct.error)
"""What Pillow and simplejpeg raise for invalid files."""

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
"""PNG chunks of text and color profiles, which Pillow unpacks up to a limit and no mask or photograph needs."""


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
        with Image.open(io.BytesIO(without_png_text(data))) as image:
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


def without_png_text(data: bytes) -> bytes:
    """Return a PNG without its texts and color profile, and other data as they are.

    Pillow refuses PNGs with more than 1 MB in one text or 64 MB in all, although the pixels may be valid.
    """
    if not data.startswith(_PNG_MAGIC):
        return data
    kept, start = [_PNG_MAGIC], len(_PNG_MAGIC)
    while start < len(data):
        # A chunk has its length in 4 bytes, its type in 4, its content, and a checksum in 4.
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if data[start + 4 : start + 8] not in _PNG_TEXT or end > len(data):
            kept.append(data[start:end])
        start = end
    return b"".join(kept)


def _check_shape(name: str, height: int, width: int) -> None:
    if (height, width) != (HEIGHT, WIDTH):
        raise CorruptFileError(f"{name} is {width} x {height} pixels. Expected {WIDTH} x {HEIGHT}. Replace it.")
