"""Output formats, and the file that each image's results go to."""

import csv
import io
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from pipeline.competition import rle
from pipeline.data.archives import walk_files, warn_of_ignored
from pipeline.errors import CarvanaError
from pipeline.segment.image_loader import is_image
from pipeline.utils.arrays import BoolArray, UInt8Array

_TINT = (40, 220, 120)
"""RGB color of the overlay."""

_OPACITY = 0.4

_JPEG_QUALITY = 92


def mask_png(mask_HW: BoolArray) -> bytes:
    """Return a mask as an 8-bit PNG of 0 and 255."""
    return _encoded(".png", mask_HW.view(np.uint8) * np.uint8(255))


def cutout_png(image_HWC: UInt8Array, mask_HW: BoolArray) -> bytes:
    """Return the foreground as a PNG with transparency; hidden pixels are black, so that the file reveals nothing."""
    rgba_HWC = np.dstack([image_HWC, mask_HW.view(np.uint8) * np.uint8(255)])
    rgba_HWC[~mask_HW] = 0
    return _encoded(".png", np.asarray(cv2.cvtColor(rgba_HWC, cv2.COLOR_RGBA2BGRA), np.uint8))


def overlay(image_HWC: UInt8Array, mask_HW: BoolArray) -> UInt8Array:
    """Return the image, uint8 RGB (H, W, 3), with the foreground tinted and outlined."""
    tint_HWC = np.zeros_like(image_HWC)
    tint_HWC[:] = _TINT
    mixed_HWC = cv2.addWeighted(image_HWC, 1 - _OPACITY, tint_HWC, _OPACITY, 0)
    over_HWC = np.where(mask_HW[..., None], mixed_HWC, image_HWC)
    lines, _ = cv2.findContours(mask_HW.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    # Scaled with the image, so that the line looks equally thick on screen.
    cv2.drawContours(over_HWC, lines, -1, _TINT, thickness=max(1, round(max(mask_HW.shape) / 800)))
    return over_HWC


def overlay_jpg(image_HWC: UInt8Array, mask_HW: BoolArray) -> bytes:
    """Return ``overlay`` as a JPEG."""
    over_HWC = np.asarray(cv2.cvtColor(overlay(image_HWC, mask_HW), cv2.COLOR_RGB2BGR), np.uint8)
    return _encoded(".jpg", over_HWC, cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY)


@dataclass(frozen=True)
class MaskFormat:
    """An output format."""

    ending: str
    """Appended to the image's name without suffix."""
    encode: Callable[[UInt8Array, BoolArray], bytes]
    """Returns the file's content for an image and its mask."""


MASK_FORMATS = {
    "mask": MaskFormat("_mask.png", lambda _, mask_HW: mask_png(mask_HW)),
    "overlay": MaskFormat("_overlay.jpg", overlay_jpg),
    "cutout": MaskFormat("_cutout.png", cutout_png),
}


def rle_row(name: str, mask_HW: BoolArray) -> str:
    """Return an image's CSV row in the competition's format, with line ending; names are quoted if necessary."""
    row = io.StringIO()
    csv.writer(row, lineterminator="\n").writerow([name, rle.encode(mask_HW)])
    return row.getvalue()


def _encoded(suffix: str, image: UInt8Array, *options: int) -> bytes:
    _, data = cv2.imencode(suffix, image, options)
    return data.tobytes()


RLE_CSV = "masks.csv"
"""RLE masks of all images."""


@dataclass(frozen=True)
class SegmentJob:
    """An image, and where its results go."""

    path: Path
    output_stem: Path
    """Path of the results without ending; keeps subfolders of the given folder."""

    def target(self, kind: str) -> Path:
        """Return the file for one of ``MASK_FORMATS``."""
        return self.output_stem.with_name(self.output_stem.name + MASK_FORMATS[kind].ending)


def plan_outputs(paths: Sequence[Path], out: Path) -> list[SegmentJob]:
    """Return one job per image: files as given, and all images in folders and their subfolders, sorted.

    Junk, files in ``out`` and duplicates are skipped; other files in folders are counted in a warning. Raises
    CarvanaError if a path does not exist, ``out`` is a file or one of the folders, or no image is found.
    """
    _check_folder(out)
    jobs: dict[Path, SegmentJob] = {}
    for given in paths:
        for path in _find_images(given, out):
            relative = path.relative_to(given) if given.is_dir() else Path(path.name)
            jobs.setdefault(path.resolve(), SegmentJob(path, out / relative.with_suffix("")))
    if not jobs:
        raise CarvanaError(f"{', '.join(map(str, paths))}: no JPEG, PNG or WebP images found.")
    return list(jobs.values())


def check_conflicts(jobs: Sequence[SegmentJob], kinds: Collection[str], csv: Path | None, *, overwrite: bool) -> None:
    """Raise CarvanaError if results would replace each other, an input image, a folder, or a file.

    With ``overwrite``, files that are not inputs may be replaced.
    """
    sources: dict[Path, Path] = {} if csv is None else {csv: csv}
    inputs = {job.path.resolve() for job in jobs}
    for job in jobs:
        for kind in kinds:
            target = job.target(kind)
            if target in sources:
                raise CarvanaError(f"{sources[target]} and {job.path} map to the same output {target}. Rename one.")
            sources[target] = job.path
    for target, path in sources.items():
        if target.resolve() in inputs:
            raise CarvanaError(f"The result of {path} would replace the input {target}. Choose another --out.")
        if target.is_dir():
            raise CarvanaError(f"The output {target} is an existing folder. Rename it, or choose another --out.")
    for folder in {target.parent for target in sources}:
        _check_folder(folder)
    if csv is not None:
        _check_distinct_names(jobs)
    existing = [] if overwrite else [target for target in sources if os.path.lexists(target)]
    if existing:
        more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise CarvanaError(f"Would overwrite {existing[0]}{more}. Add --overwrite, or choose another --out.")


def _check_folder(folder: Path) -> None:
    """Raise CarvanaError if the folder or one of its parents is an existing file."""
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise CarvanaError(f"{existing} is a file. Choose a folder for the results.")


def _check_distinct_names(jobs: Sequence[SegmentJob]) -> None:
    seen: dict[str, Path] = {}
    for job in jobs:
        other = seen.setdefault(job.path.name, job.path)
        if other != job.path:
            raise CarvanaError(
                f"{other} and {job.path} have the same name in {RLE_CSV}. Rename one, or leave out the format rle."
            )


def _find_images(given: Path, out: Path) -> list[Path]:
    """Return the path of a file, or those of all images in a folder."""
    if not given.is_dir():
        if not given.exists():
            raise CarvanaError(f"{given} does not exist.")
        return [given]
    if given.resolve() == out.resolve():
        raise CarvanaError(f"{given} holds the input images. Choose another folder for the results.")
    files = list(walk_files(given, without=out))
    images = [file for file in files if is_image(given / file)]
    found = set(images)
    warn_of_ignored(given, [str(file) for file in files if file not in found])
    return [given / file for file in images]
