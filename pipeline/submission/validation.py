"""Validate and score a submission: a CSV with one row per image, plain, gzipped or zipped.

A full submission has 100,064 rows and about 0.8 GB of text, so it is read as a stream, row by row. Rows are numbered as
in editors and spreadsheets: the header is row 1.
"""

import hashlib
import io
import math
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.competition import rle
from pipeline.competition.dice import ConfusionCounts, confusion_counts_from_runs
from pipeline.competition.image_ids import HEIGHT, WIDTH, image_filename
from pipeline.errors import CarvanaError
from pipeline.submission.csv_file import check_header, parse_line, read_lines, read_rows

ProgressBar = Callable[[Iterator[Any]], Iterable[Any]]
"""Wraps an iterator of rows to show progress, as tqdm does."""

PLAUSIBLE_COVERAGE = 0.05, 0.6
"""Range of mask coverage, 0 to 1, that is plausible for a car; the training masks cover 0.088 to 0.410."""

_PIXELS = HEIGHT * WIDTH


@dataclass(frozen=True)
class SubmissionReport:
    """Summary of a valid submission."""

    rows: int
    """Number of rows, without the header."""
    empty: int
    """Number of rows with an empty mask."""
    coverage_min: float
    """Smallest mask coverage: the share of foreground pixels in an image, 0 to 1."""
    coverage_mean: float
    """Mean mask coverage over the images."""
    coverage_max: float
    """Largest mask coverage."""
    unlikely: tuple[tuple[str, float], ...]
    """Image id and coverage of each mask that is not empty, but outside ``PLAUSIBLE_COVERAGE``."""
    sha256: str
    """Hex digest of the uncompressed CSV text, so that plain, gzipped and zipped copies have the same."""


@dataclass(frozen=True)
class SubmissionScore:
    """Score of a submission against the true masks, as Kaggle computes it."""

    counts: dict[str, ConfusionCounts]
    """Pixel counts by image id, in the submission's order."""

    @property
    def dice(self) -> dict[str, float]:
        """Dice by image id, 0 to 1."""
        return {image_id: counts.dice for image_id, counts in self.counts.items()}

    @property
    def mean(self) -> float:
        """Mean Dice over the images: the score on Kaggle."""
        return self._mean("dice")

    @property
    def mean_iou(self) -> float:
        """Mean intersection over union."""
        return self._mean("iou")

    @property
    def mean_accuracy(self) -> float:
        """Mean pixel accuracy."""
        return self._mean("accuracy")

    def _mean(self, name: str) -> float:
        return math.fsum(getattr(counts, name) for counts in self.counts.values()) / len(self.counts)


def validate_submission(
    path: Path, expected_ids: Collection[str] | None = None, progress: ProgressBar = iter
) -> SubmissionReport:
    """Return a summary of a submission, or raise CarvanaError, which names the file, the row and the reason.

    ``expected_ids`` are the images that it must contain, each once and no others; None accepts any image ids. Invalid
    are: a file or row that ``read_rows`` rejects, a duplicate or unexpected image, a run-length code that does not fit
    a 1280 x 1918 mask, missing images, and a file without rows.
    """
    expected = None if expected_ids is None else frozenset(expected_ids)
    digest = hashlib.sha256()
    seen: set[str] = set()
    areas: list[int] = []  # foreground pixels per image
    unlikely: list[tuple[str, float]] = []

    stream = read_lines(path)
    header = next(stream, b"")
    check_header(path, header)
    digest.update(header)
    for row, line in enumerate(progress(stream), start=2):
        digest.update(line)
        image_id, text = parse_line(path, row, line)
        if image_id in seen:
            raise _duplicate_error(path, row, image_id)
        if expected is not None and image_id not in expected:
            raise CarvanaError(f"{_location(path, row, image_id)}: not an expected image. Remove the row.")
        seen.add(image_id)
        areas.append(int(_parse_row_runs(path, row, image_id, text)[:, 1].sum()))
        coverage = areas[-1] / _PIXELS
        if areas[-1] and not PLAUSIBLE_COVERAGE[0] <= coverage <= PLAUSIBLE_COVERAGE[1]:
            unlikely.append((image_id, coverage))

    if expected_ids is not None:
        _check_complete(path, expected_ids, seen)
    if not areas:
        raise CarvanaError(f"{path} has a header but no rows. Expected one row per image.")
    return SubmissionReport(
        rows=len(areas),
        empty=areas.count(0),
        coverage_min=min(areas) / _PIXELS,
        coverage_mean=sum(areas) / len(areas) / _PIXELS,
        coverage_max=max(areas) / _PIXELS,
        unlikely=tuple(unlikely),
        sha256=digest.hexdigest(),
    )


def coverage_warnings(report: SubmissionReport) -> list[str]:
    """Return warnings about masks in a valid submission that are probably mistakes."""
    warnings = []
    if report.empty:
        warnings.append(f"{report.empty} of {report.rows} masks are empty.")
    if report.unlikely:
        (image_id, coverage), least, most = report.unlikely[0], *PLAUSIBLE_COVERAGE
        warnings.append(
            f"{len(report.unlikely)} of {report.rows} masks cover less than {least:.0%} or more than {most:.0%} of "
            f"their image, first {image_id} with {coverage:.1%}."
        )
    return warnings


def score_submission(
    path: Path, truth_path: Path, progress: ProgressBar = iter, spill_dir: Path | None = None
) -> SubmissionScore:
    """Return the score of a submission, given a CSV of the true masks in the same format.

    Both files are read side by side. True masks that come before their row in the submission are kept in a temporary
    file in ``spill_dir``, so that memory stays small in any order of rows. Raises CarvanaError for a file or row that
    ``read_rows`` rejects, a duplicate image, a run-length code that does not fit a 1280 x 1918 mask, an image that is
    in only one of the files, and files without rows.
    """
    counts: dict[str, ConfusionCounts] = {}
    truth = _read_truth(truth_path)
    with tempfile.TemporaryFile(dir=spill_dir) as file:
        spilled = _SpilledRuns(file)
        for row, image_id, text in progress(read_rows(path)):
            if image_id in counts:
                raise _duplicate_error(path, row, image_id)
            predicted = _parse_row_runs(path, row, image_id, text)
            true = spilled.pop(image_id) if image_id in spilled else _read_until(image_id, truth, spilled)
            if true is None:
                raise CarvanaError(f"{_location(path, row, image_id)}: {truth_path} has no mask of this image.")
            counts[image_id] = confusion_counts_from_runs(predicted, true, _PIXELS)
        for image_id, runs in truth:
            spilled.put(image_id, runs)

        if len(spilled):
            raise CarvanaError(
                f"{path} has no row for {len(spilled)} of the images in {truth_path}, first {spilled.first()}. "
                "Add these rows, or score against the submission's images only."
            )
    if not counts:
        raise CarvanaError(f"{path} and {truth_path} have headers but no rows: nothing to score.")
    return SubmissionScore(counts)


class _SpilledRuns:
    """Runs by image id, kept in a file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._spans: dict[str, tuple[int, int]] = {}  # offset and size, in bytes

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._spans

    def __len__(self) -> int:
        return len(self._spans)

    def first(self) -> str:
        """Return the image that was added first."""
        return next(iter(self._spans))

    def put(self, image_id: str, runs_N2: NDArray[np.int64]) -> None:
        offset = self._file.seek(0, io.SEEK_END)
        self._spans[image_id] = offset, self._file.write(runs_N2.astype(np.int32).tobytes())

    def pop(self, image_id: str) -> NDArray[np.int64]:
        offset, size = self._spans.pop(image_id)
        self._file.seek(offset)
        return np.frombuffer(self._file.read(size), dtype=np.int32).reshape(-1, 2).astype(np.int64)


def _read_truth(path: Path) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Yield the image id and the runs of each true mask; raises CarvanaError for a duplicate image."""
    seen: set[str] = set()
    for row, image_id, text in read_rows(path):
        if image_id in seen:
            raise _duplicate_error(path, row, image_id)
        seen.add(image_id)
        yield image_id, _parse_row_runs(path, row, image_id, text)


def _read_until(
    image_id: str, truth: Iterator[tuple[str, NDArray[np.int64]]], spilled: _SpilledRuns
) -> NDArray[np.int64] | None:
    """Return the true runs of an image and spill those of the images before it; None if the image does not come."""
    for other_id, runs in truth:
        if other_id == image_id:
            return runs
        spilled.put(other_id, runs)
    return None


def _parse_row_runs(path: Path, row: int, image_id: str, text: str) -> NDArray[np.int64]:
    """Return the runs of a row; raises CarvanaError, which names the row, if they are not valid."""
    try:
        runs = rle.parse_runs(text)
        rle.validate_runs(runs, _PIXELS)
    except CarvanaError as error:
        raise CarvanaError(f"{_location(path, row, image_id)}: {error}") from None
    return runs


def _check_complete(path: Path, expected_ids: Collection[str], seen: set[str]) -> None:
    missing = [image_id for image_id in expected_ids if image_id not in seen]
    if missing:
        raise CarvanaError(
            f"{path} has no row for {len(missing)} of {len(expected_ids)} images, first {image_filename(missing[0])}. "
            "Add a row for each; leave the mask column blank for an empty mask."
        )


def _duplicate_error(path: Path, row: int, image_id: str) -> CarvanaError:
    return CarvanaError(f"{_location(path, row, image_id)}: duplicate row for this image. Keep one.")


def _location(path: Path, row: int, image_id: str) -> str:
    return f"{path}, row {row} ({image_filename(image_id)})"
