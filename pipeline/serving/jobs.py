"""Which pictures to take, and where what is made of them goes: all of it settled before any work."""

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import CarvanaError
from pipeline.serving.outputs import MASK_FORMATS

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
