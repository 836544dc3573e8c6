"""Formats of masks, and which file each image's mask goes to."""

import csv
import io
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from pipeline.competition import rle
from pipeline.errors import CarvanaError
from pipeline.utils.arrays import BoolArray, UInt8Array

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


SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
"""Of pictures in folders, in small or capital letters. A file that is named itself is opened whatever its suffix."""

RLE_CSV = "masks.csv"
"""Run-length codes of all pictures."""


@dataclass(frozen=True)
class SegmentJob:
    """A picture, and where its results go."""

    path: Path
    output_stem: Path
    """Of its results: folders below the one that was given are kept, the suffix is not."""

    def target(self, kind: str) -> Path:
        """Return the file for one of ``KINDS``."""
        return self.output_stem.with_name(self.output_stem.name + MASK_FORMATS[kind].ending)


def plan_outputs(paths: Sequence[Path], out: Path) -> list[SegmentJob]:
    """Return a job for each picture: files as given, folders with all below them, sorted.

    What is hidden, and what lies in ``out``, is left out; a picture that is named twice is taken once. Raises
    CarvanaError if a path does not exist, ``out`` is a file or one of the folders, or no picture is found.
    """
    _check_folder(out)
    jobs: dict[Path, SegmentJob] = {}
    for given in paths:
        for path, below in _pictures(given, out):
            jobs.setdefault(path.resolve(), SegmentJob(path, out / below.with_suffix("")))
    if not jobs:
        raise CarvanaError(
            f"{', '.join(map(str, paths))}: no picture there. Folders are searched for {', '.join(SUFFIXES)}."
        )
    return list(jobs.values())


def check_conflicts(jobs: Sequence[SegmentJob], kinds: Collection[str], csv: Path | None, *, overwrite: bool) -> None:
    """Raise CarvanaError if results would meet: each other, a picture that is read, a folder, or a file.

    Files may be met where ``overwrite`` says so.
    """
    meant: dict[Path, Path] = {} if csv is None else {csv: csv}
    pictures = {job.path.resolve() for job in jobs}
    for job in jobs:
        for kind in kinds:
            target = job.target(kind)
            if target in meant:
                raise CarvanaError(f"{meant[target]} and {job.path} would both be {target}: rename one of them.")
            meant[target] = job.path
    for target, path in meant.items():
        if target.resolve() in pictures:
            raise CarvanaError(f"What {path} gives would replace {target}, a picture to read: name another --out.")
        if target.is_dir():
            raise CarvanaError(f"{target} is a folder, in the way of a result: rename it, or name another --out.")
    for folder in {target.parent for target in meant}:
        _check_folder(folder)
    if csv is not None:
        _check_distinct_names(jobs)
    there = [] if overwrite else [target for target in meant if os.path.lexists(target)]
    if there:
        more = f" and {len(there) - 1} more of the results" if len(there) > 1 else ""
        raise CarvanaError(f"{there[0]}{more} would be overwritten: add --overwrite, or name another --out.")


def _check_folder(folder: Path) -> None:
    """Raise CarvanaError if a file stands where a folder for results, or one above it, would be."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise CarvanaError(f"{there} is a file: name a folder for the results.")


def _check_distinct_names(jobs: Sequence[SegmentJob]) -> None:
    seen: dict[str, Path] = {}
    for job in jobs:
        twin = seen.setdefault(job.path.name, job.path)
        if twin != job.path:
            raise CarvanaError(
                f"{twin} and {job.path} would have one name in {RLE_CSV}: rename one of them, or do without rle."
            )


def _pictures(given: Path, out: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the pictures that a path stands for, each with where it lies below that path."""
    if not given.is_dir():
        if not given.exists():
            raise CarvanaError(f"{given} does not exist.")
        yield given, Path(given.name)
        return
    results = out.resolve()
    if given.resolve() == results:
        raise CarvanaError(f"{given} is where the pictures are: name another folder for the results.")
    for folder, folders, files in os.walk(given, onerror=_stop):
        here = Path(folder)
        folders[:] = sorted(name for name in folders if name[0] != "." and (here / name).resolve() != results)
        for name in sorted(files):
            if name[0] != "." and Path(name).suffix.lower() in SUFFIXES:
                yield here / name, (here / name).relative_to(given)


def _stop(error: OSError) -> None:
    raise error
