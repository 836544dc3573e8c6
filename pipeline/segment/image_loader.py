"""Load users' images safely: detect the type by content, check limits before decoding, apply the EXIF orientation."""

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from pipeline.data.archives import IMAGE_ENDINGS
from pipeline.data.decoding import DECODE_ERRORS
from pipeline.errors import CorruptFileError
from pipeline.utils.arrays import UInt8Array

# Pillow warns about damaged EXIF and large images. Users of the app do not see stderr, and the limits here are lower.
warnings.filterwarnings("ignore", module=r"PIL\.")

_MAGIC_BYTES = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "WebP": re.compile(rb"RIFF....WEBP", re.DOTALL),
}
"""First bytes of each file type."""

_SUFFIXES = (*IMAGE_ENDINGS, ".png", ".webp")
"""Suffixes that promise an image: a file with other content is an image that cannot be read."""

_SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")
"""Start of a scan in a JPEG: marker, length and number of components."""

_ORIENTATION = 0x0112
"""EXIF tag of the orientation."""

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
"""Transforms from stored pixels (H, W, 3) to upright ones, by EXIF orientation."""


@dataclass(frozen=True)
class ImageLimits:
    """Limits that an image must meet before it is decoded."""

    bytes: int = 64 << 20
    """Largest file size."""
    pixels: int = 100_000_000
    """Most pixels; Pillow rejects more than 178,956,970 in any case."""
    side: int = 65_500
    """Largest height and width: the maximum of JPEG."""
    scans: int = 100
    """Most scans of a progressive JPEG; about 10 are usual. Each costs a pass over all pixels, but only a few bytes."""

    def allow(self, image: Image.Image) -> bool:
        """Return whether an opened image, of which only the header is read, may be decoded."""
        return image.width * image.height <= self.pixels and max(image.size) <= self.side


DEFAULT_LIMITS = ImageLimits()


def load_image(source: Path | bytes, name: str, limits: ImageLimits = DEFAULT_LIMITS) -> UInt8Array:
    """Return a JPEG, PNG or WebP as uint8 RGB (H, W, 3), upright according to its EXIF orientation.

    Transparency is blended with white, 16 bits are rounded to 8, and gray, palette and CMYK images are converted to
    RGB. Color profiles are ignored, as in training. Of an animation, the first frame is used. Raises CorruptFileError,
    naming ``name``, if the file exceeds ``limits``, has another type or is invalid (truncated images are never filled
    in), and OSError if it cannot be read.
    """
    data = _bytes_of(source, name, limits)
    kind = _kind_of(data)
    if kind is None:
        raise CorruptFileError(f"{name}: not a JPEG, PNG or WebP. Convert it.")
    try:
        with Image.open(io.BytesIO(data), formats=[kind.upper()]) as image:  # reads only the header
            if not limits.allow(image):
                raise _too_large(name, f"{image.width} x {image.height}", limits)
            if kind == "JPEG" and (scans := len(_SCAN.findall(data))) > limits.scans:
                raise CorruptFileError(f"{name}: {scans} scans, at most {limits.scans} are allowed. Save it again.")
            transpose = _EXIF_TRANSPOSE[_orientation(image)]
            return np.ascontiguousarray(transpose(_decode_jpeg(data) if kind == "JPEG" else _decode(image, data)))
    except Image.DecompressionBombError as error:
        raise _too_large(name, "too many", limits) from error
    except DECODE_ERRORS as error:
        # Pillow's own message would contain the address of an object in memory.
        reason = "invalid header" if isinstance(error, UnidentifiedImageError) else error
        raise CorruptFileError(f"{name}: not a valid {kind} (truncated?): {reason}. Save it again.") from error


def is_image(path: Path) -> bool:
    """Return whether a file begins as a JPEG, PNG or WebP does, or has such a suffix; False for pipes and devices."""
    if path.exists() and not path.is_file():
        return False  # opening a pipe would wait for a writer
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError:
        return path.suffix.lower() in _SUFFIXES
    return _kind_of(start) is not None or path.suffix.lower() in _SUFFIXES


def _kind_of(start: bytes) -> str | None:
    """Return ``JPEG``, ``PNG`` or ``WebP`` by the first bytes of a file; None for another type."""
    return next((kind for kind, magic in _MAGIC_BYTES.items() if magic.match(start)), None)


def image_area(path: Path, limits: ImageLimits = DEFAULT_LIMITS) -> int:
    """Return the number of pixels according to the file's header; 0 if it is invalid or exceeds ``limits``."""
    try:
        with path.open("rb") as file, Image.open(file, formats=[kind.upper() for kind in _MAGIC_BYTES]) as image:
            return image.width * image.height if limits.allow(image) else 0
    except (Image.DecompressionBombError, *DECODE_ERRORS):
        return 0


def _bytes_of(source: Path | bytes, name: str, limits: ImageLimits) -> bytes:
    if isinstance(source, bytes):
        data = source
    else:
        with source.open("rb") as file:
            data = file.read(limits.bytes + 1)
    if len(data) > limits.bytes:
        raise CorruptFileError(f"{name}: larger than {limits.bytes >> 20} MB. Shrink it.")
    return data


def _too_large(name: str, size: str, limits: ImageLimits) -> CorruptFileError:
    allowed = f"{limits.pixels / 1e6:g} million and {limits.side:,} per side"
    return CorruptFileError(f"{name}: {size} pixels, at most {allowed} are allowed. Shrink it.")


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation; 1 (as stored) if it is missing or invalid."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except DECODE_ERRORS:
        return 1
    return orientation if orientation in _EXIF_TRANSPOSE else 1


def _decode_jpeg(data: bytes) -> UInt8Array:
    # Not with Pillow: it fills truncated JPEGs with gray. The competition's images are decoded the same way.
    if simplejpeg.decode_jpeg_header(data)[2] not in ("CMYK", "YCCK"):
        return np.asarray(simplejpeg.decode_jpeg(data, "RGB", strict=True))
    cmyk_HWC = simplejpeg.decode_jpeg(data, "CMYK", strict=True).astype(np.uint16)
    # CMYK JPEGs are stored inverted, following Adobe: 255 is no ink.
    return np.asarray((cmyk_HWC[..., :3] * cmyk_HWC[..., 3:] + 127) // 255, np.uint8)


def _decode(image: Image.Image, data: bytes) -> UInt8Array:
    if image.format == "PNG":
        Image.open(io.BytesIO(data)).verify()  # checks checksums and the end of the file, which decoding does not
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    rgba = image.convert("RGBA")
    blended = Image.new("RGB", rgba.size, "white")
    blended.paste(rgba, mask=rgba.getchannel("A"))
    return np.asarray(blended)


def _from_16_bits(image: Image.Image) -> UInt8Array:
    # Not with Pillow: its conversion clips at 255.
    gray_HW = np.asarray(image).astype(np.uint32)
    rounded_HW = ((gray_HW + 128) // 257).astype(np.uint8)
    if image.has_transparency_data:
        rounded_HW[gray_HW == image.info["transparency"]] = 255
    return np.repeat(rounded_HW[..., None], 3, axis=2)
