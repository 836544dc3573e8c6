"""People's own pictures, which may be anything: told by content, bounded before they are decoded, upright."""

import io
import re
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from pipeline.errors import CorruptFileError
from pipeline.utils.arrays import UInt8Array

# On damaged EXIF, and large pictures: whoever sent the picture reads no stderr, and the limits here are lower.
warnings.filterwarnings("ignore", module=r"PIL\.")

_MAGIC_BYTES = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "WebP": re.compile(rb"RIFF....WEBP", re.DOTALL),
}
"""First bytes of each type."""

_SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")
"""Where a scan of a JPEG begins: its marker, length, and number of components."""

_FAULTS = (OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError, EOFError, struct.error)
"""What Pillow and simplejpeg raise at files that are not sound."""

_ORIENTATION = 0x0112
"""EXIF's tag for how pixels are stored."""

_EXIF_TRANSPOSE: dict[int, Callable[[UInt8Array], UInt8Array]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored[::-1].swapaxes(0, 1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: stored[:, ::-1].swapaxes(0, 1),
}
"""From pixels (H, W, 3) as stored to upright, by EXIF's number."""


@dataclass(frozen=True)
class ImageLimits:
    """What a picture may be at most; a larger one is refused before it is decoded."""

    bytes: int = 64 << 20
    """Of the file."""
    pixels: int = 100_000_000
    """Of what it unpacks to; Pillow refuses more than 178,956,970 whatever this says."""
    side: int = 65_500
    """Of its height and of its width, since a JPEG can't have more."""
    scans: int = 100
    """Of a progressive JPEG, which has about ten. Each is a pass over all pixels, that a few bytes can ask for."""

    def allow(self, picture: Image.Image) -> bool:
        """Return whether a picture, of which the header is read, may be decoded."""
        return picture.width * picture.height <= self.pixels and max(picture.size) <= self.side


DEFAULT_LIMITS = ImageLimits()


def load_image(source: Path | bytes, name: str, limits: ImageLimits = DEFAULT_LIMITS) -> UInt8Array:
    """Return a JPEG, PNG or WebP, told by content, as uint8 RGB (H, W, 3), upright as its EXIF says.

    What is transparent lies over white; 16 bits are rounded to 8; grey, palette and CMYK become RGB. Values are taken
    as they stand, as sRGB: color profiles are not applied, as they were not to what nets learned from. Of an
    animation, the first picture. Raises CorruptFileError that names ``name`` and says why if the file is too large, of
    another type or not sound, since nothing that is missing is ever filled in; and OSError if it can't be read.
    """
    data = _bytes_of(source, name, limits)
    kind = next((kind for kind, start in _MAGIC_BYTES.items() if start.match(data)), None)
    if kind is None:
        raise CorruptFileError(f"{name} is no JPEG, PNG or WebP: convert it.")
    try:
        with Image.open(io.BytesIO(data), formats=[kind.upper()]) as picture:  # reads the header alone
            if not limits.allow(picture):
                raise _too_large(name, f"{picture.width} x {picture.height}", limits)
            if kind == "JPEG" and (scans := len(_SCAN.findall(data))) > limits.scans:
                raise CorruptFileError(f"{name} has {scans} scans, at most it may have {limits.scans}: save it again.")
            turn = _EXIF_TRANSPOSE[_orientation(picture)]
            return np.ascontiguousarray(turn(_decode_jpeg(data) if kind == "JPEG" else _decode(picture, data)))
    except Image.DecompressionBombError as error:
        raise _too_large(name, "too many", limits) from error
    except _FAULTS as error:
        # Pillow's own words would name an object in memory.
        why = "its header makes no sense" if isinstance(error, UnidentifiedImageError) else error
        raise CorruptFileError(
            f"{name} is not a valid {kind}, maybe truncated ({why}): fetch or save it again."
        ) from error


def image_area(path: Path, limits: ImageLimits = DEFAULT_LIMITS) -> int:
    """Return how many pixels the header of a file announces, 0 if it has none, or more than ``limits`` allow."""
    try:
        with path.open("rb") as file, Image.open(file, formats=[kind.upper() for kind in _MAGIC_BYTES]) as picture:
            return picture.width * picture.height if limits.allow(picture) else 0
    except (Image.DecompressionBombError, *_FAULTS):
        return 0


def _bytes_of(source: Path | bytes, name: str, limits: ImageLimits) -> bytes:
    if isinstance(source, bytes):
        data = source
    else:
        with source.open("rb") as file:
            data = file.read(limits.bytes + 1)
    if len(data) > limits.bytes:
        raise CorruptFileError(f"{name} has more than {limits.bytes >> 20} MB: shrink it.")
    return data


def _too_large(name: str, size: str, limits: ImageLimits) -> CorruptFileError:
    most = f"{limits.pixels / 1e6:g} million, and {limits.side:,} a side"
    return CorruptFileError(f"{name} has {size} pixels, at most it may have {most}: shrink it.")


def _orientation(picture: Image.Image) -> int:
    """Return EXIF's number; 1, as stored, where there is none, or nothing that makes sense."""
    try:
        orientation = picture.getexif().get(_ORIENTATION)
    except _FAULTS:
        return 1
    return orientation if orientation in _EXIF_TRANSPOSE else 1


def _decode_jpeg(data: bytes) -> UInt8Array:
    # Strict: Pillow takes what a damaged JPEG lacks for grey. And so the competition's are the same to the bit.
    if simplejpeg.decode_jpeg_header(data)[2] not in ("CMYK", "YCCK"):
        return np.asarray(simplejpeg.decode_jpeg(data, "RGB", strict=True))
    cmyk_HWC = simplejpeg.decode_jpeg(data, "CMYK", strict=True).astype(np.uint16)
    # Stored inverted, as Adobe does it and everyone since: 255 is no ink.
    return np.asarray((cmyk_HWC[..., :3] * cmyk_HWC[..., 3:] + 127) // 255, np.uint8)


def _decode(picture: Image.Image, data: bytes) -> UInt8Array:
    if picture.format == "PNG":
        Image.open(io.BytesIO(data)).verify()  # checksums, and that the file has its end: reading looks at neither
    if picture.mode.startswith("I"):
        return _from_16_bits(picture)
    if not picture.has_transparency_data:
        return np.asarray(picture.convert("RGB"))
    rgba = picture.convert("RGBA")
    over = Image.new("RGB", rgba.size, "white")
    over.paste(rgba, mask=rgba.getchannel("A"))
    return np.asarray(over)


def _from_16_bits(picture: Image.Image) -> UInt8Array:
    # By hand: Pillow's own conversion cuts off at 255.
    grey_HW = np.asarray(picture).astype(np.uint32)
    rounded_HW = ((grey_HW + 128) // 257).astype(np.uint8)
    if picture.has_transparency_data:
        rounded_HW[grey_HW == picture.info["transparency"]] = 255
    return np.repeat(rounded_HW[..., None], 3, axis=2)
