"""A submission as Kaggle takes it: one CSV row per image, plain, gzipped or zipped, read as a stream.

The full one is 100,064 rows and about 0.8 GB of text, so nothing here holds more than a row of it. Rows are counted as
editors and spreadsheets count them: the header is row 1.
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
from pipeline.submission.csv_file import _check_header, _fields, read_lines, read_rows

ProgressBar = Callable[[Iterator[Any]], Iterable[Any]]
"""Passes rows on, and shows a person how many went by."""

PLAUSIBLE_COVERAGE = 0.05, 0.6
"""Shares of an image between which a mask is likely to be a car; the training masks cover 0.088 to 0.410."""

_PIXELS = HEIGHT * WIDTH


@dataclass(frozen=True)
class SubmissionReport:
    """What a submission holds that passed `check`."""

    rows: int
    """Rows, without the header."""
    empty: int
    """Rows whose mask is empty."""
    coverage_min: float
    """Smallest share of an image, 0 to 1, that is car."""
    coverage_mean: float
    """Mean share over the images."""
    coverage_max: float
    """Largest share."""
    unlikely: tuple[tuple[str, float], ...]
    """Image id and share of the masks that are not empty, but smaller or larger than cars of the competition are."""
    sha256: str
    """Hex digest of the CSV text, uncompressed: the same for a plain, a gzipped and a zipped copy."""


@dataclass(frozen=True)
class SubmissionScore:
    """How a submission's masks agree with the true ones, as Kaggle scores it."""

    counts: dict[str, ConfusionCounts]
    """Pixels of each image, by image id, in the submission's order."""

    @property
    def dice(self) -> dict[str, float]:
        """Dice of each image, 0 to 1."""
        return {image_id: counts.dice for image_id, counts in self.counts.items()}

    @property
    def mean(self) -> float:
        """The score: mean of the images' Dice."""
        return self._mean("dice")

    @property
    def mean_iou(self) -> float:
        """Mean of the images' intersection over union."""
        return self._mean("iou")

    @property
    def mean_accuracy(self) -> float:
        """Mean of the images' share of right pixels."""
        return self._mean("accuracy")

    def _mean(self, name: str) -> float:
        return math.fsum(getattr(counts, name) for counts in self.counts.values()) / len(self.counts)


def validate_submission(
    path: Path, expected_ids: Collection[str] | None = None, progress: ProgressBar = iter
) -> SubmissionReport:
    """Return what a submission holds, or refuse it.

    ``expected_ids`` are the images that it must hold, each once and no other; None takes any image ids. Raises
    CarvanaError, naming the file, the row and the reason, for whatever `rows` refuses, a duplicate or unknown image,
    a run-length code that is none of a 1280 x 1918 mask, missing images, and a file without rows.
    """
    expected = None if expected_ids is None else frozenset(expected_ids)
    digest = hashlib.sha256()
    seen: set[str] = set()
    areas: list[int] = []  # pixels of car, image by image
    unlikely: list[tuple[str, float]] = []

    stream = read_lines(path)
    header = next(stream, b"")
    _check_header(path, header)
    digest.update(header)
    for row, line in enumerate(progress(stream), start=2):
        digest.update(line)
        image_id, text = _fields(path, row, line)
        if image_id in seen:
            raise _duplicate_error(path, row, image_id)
        if expected is not None and image_id not in expected:
            raise CarvanaError(f"{_where(path, row, image_id)}: not one of the images expected; leave it out.")
        seen.add(image_id)
        areas.append(int(_parse_row_runs(path, row, image_id, text)[:, 1].sum()))
        share = areas[-1] / _PIXELS
        if areas[-1] and not PLAUSIBLE_COVERAGE[0] <= share <= PLAUSIBLE_COVERAGE[1]:
            unlikely.append((image_id, share))

    if expected_ids is not None:
        _check_complete(path, expected_ids, seen)
    if not areas:
        raise CarvanaError(f"{path} holds a header and no rows: expected one row per image.")
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
    """Return what is allowed in a submission, but not likely to be meant."""
    words = []
    if report.empty:
        words.append(f"{report.empty} of {report.rows} masks are empty.")
    if report.unlikely:
        (image_id, share), least, most = report.unlikely[0], *PLAUSIBLE_COVERAGE
        words.append(
            f"{len(report.unlikely)} of {report.rows} masks cover less than {least:.0%} or more than {most:.0%} of "
            f"their image, first {image_id} with {share:.1%}."
        )
    return words


def score_submission(
    path: Path, truth_path: Path, progress: ProgressBar = iter, spill_dir: Path | None = None
) -> SubmissionScore:
    """Return the Dice of each image of a submission, given a CSV of the true masks in the same form.

    Both files are read side by side. True masks that the submission has not come to yet wait in a temporary file, so
    that memory stays small in whatever order the rows are; ``spill`` is the folder for it. Raises CarvanaError for
    whatever `rows` refuses in either file, a duplicate image, a run-length code that is none of a 1280 x 1918 mask, an
    image that only one file holds, and files without rows.
    """
    counts: dict[str, ConfusionCounts] = {}
    truth = _truth(truth_path)
    with tempfile.TemporaryFile(dir=spill_dir) as file:
        waiting = _SpilledRuns(file)
        for row, image_id, text in progress(read_rows(path)):
            if image_id in counts:
                raise _duplicate_error(path, row, image_id)
            predicted = _parse_row_runs(path, row, image_id, text)
            true = waiting.take(image_id) if image_id in waiting else _read_up_to(image_id, truth, waiting)
            if true is None:
                raise CarvanaError(f"{_where(path, row, image_id)}: {truth_path} has no mask of this image.")
            counts[image_id] = confusion_counts_from_runs(predicted, true, _PIXELS)
        for image_id, runs in truth:
            waiting.put(image_id, runs)

        if len(waiting):
            raise CarvanaError(
                f"{path} has no row for {len(waiting)} of the images in {truth_path}, first {waiting.first()}: "
                "add them, or score against their images only."
            )
    if not counts:
        raise CarvanaError(f"{path} and {truth_path} hold headers and no rows: nothing to score.")
    return SubmissionScore(counts)


class _SpilledRuns:
    """Runs of images, kept in a file and found by image id."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._places: dict[str, tuple[int, int]] = {}  # offset and size, in bytes

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._places

    def __len__(self) -> int:
        return len(self._places)

    def first(self) -> str:
        """Return the image that has waited longest."""
        return next(iter(self._places))

    def put(self, image_id: str, runs_N2: NDArray[np.int64]) -> None:
        offset = self._file.seek(0, io.SEEK_END)
        self._places[image_id] = offset, self._file.write(runs_N2.astype(np.int32).tobytes())

    def take(self, image_id: str) -> NDArray[np.int64]:
        offset, size = self._places.pop(image_id)
        self._file.seek(offset)
        return np.frombuffer(self._file.read(size), dtype=np.int32).reshape(-1, 2).astype(np.int64)


def _truth(path: Path) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Yield image id and runs of each true mask, each image once."""
    seen: set[str] = set()
    for row, image_id, text in read_rows(path):
        if image_id in seen:
            raise _duplicate_error(path, row, image_id)
        seen.add(image_id)
        yield image_id, _parse_row_runs(path, row, image_id, text)


def _read_up_to(
    image_id: str, truth: Iterator[tuple[str, NDArray[np.int64]]], waiting: _SpilledRuns
) -> NDArray[np.int64] | None:
    """Return the image's true runs, and let those read on the way wait; None if the truth ends before."""
    for other_id, runs in truth:
        if other_id == image_id:
            return runs
        waiting.put(other_id, runs)
    return None


def _parse_row_runs(path: Path, row: int, image_id: str, text: str) -> NDArray[np.int64]:
    """Return the valid runs of a row."""
    try:
        runs = rle.parse_runs(text)
        rle.validate_runs(runs, _PIXELS)
    except CarvanaError as error:
        raise CarvanaError(f"{_where(path, row, image_id)}: {error}") from None
    return runs


def _check_complete(path: Path, expected_ids: Collection[str], seen: set[str]) -> None:
    missing = [image_id for image_id in expected_ids if image_id not in seen]
    if missing:
        raise CarvanaError(
            f"{path} misses {len(missing)} of {len(expected_ids)} images, first {image_filename(missing[0])}: "
            "add a row for each, with nothing after the comma where the mask is empty."
        )


def _duplicate_error(path: Path, row: int, image_id: str) -> CarvanaError:
    return CarvanaError(f"{_where(path, row, image_id)}: a second row of this image; keep one.")


def _where(path: Path, row: int, image_id: str) -> str:
    return f"{path}, row {row} ({image_filename(image_id)})"
