"""Validate and score a submission: a CSV with one row per image, plain, gzipped or zipped.

A full submission has 100,064 rows and about 0.8 GB of text, so it is read as a stream, row by row. Rows are numbered as
in editors and spreadsheets: the header is row 1.
"""

import hashlib
import io
import math
import tempfile
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.competition import rle
from pipeline.competition.dice import ConfusionCounts, confusion_counts_from_runs
from pipeline.competition.image_ids import ANGLES, HEIGHT, WIDTH, image_filename
from pipeline.errors import CarvanaError
from pipeline.submission.csv_file import check_header, parse_line, read_lines, read_rows

ProgressBar = Callable[[Iterator[Any]], Iterable[Any]]
"""Wraps an iterator of rows to show progress, as tqdm does."""

PLAUSIBLE_COVERAGE = 0.05, 0.5
"""Range of mask coverage, 0 to 1, that is plausible for a car; the training masks cover 0.088 to 0.410, so that any of
them inverted covers more than 0.5."""

PLAUSIBLE_CENTER = (440.0, 920.0), (620.0, 1290.0)
"""Range of the row and of the column of a mask's center of mass; 800 real masks have 490 to 870 and 686 to 1229."""

_USUAL_CENTER = 650.0, 942.0
"""Mean row and column of the centers of many masks."""
_CAR_DEVIATION = 70.0, 20.0
"""Standard deviation of the mean center of one car's images over the cars, in pixels."""
_MAX_STRIDE_ERROR = 1.0
"""How far the distance of a mask's rows may be from the width, in pixels; 800 real masks are within 1.0."""
_MIN_RUNS = 50
"""Fewest runs from which the distance of a mask's rows is estimated."""
_SHOWN = 3

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
    warnings: tuple[str, ...] = field(default=(), compare=False)
    """What is probably a mistake in the masks, from ``GeometryCheck``."""


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
    geometry = GeometryCheck()

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
        runs = _parse_row_runs(path, row, image_id, text)
        areas.append(int(runs[:, 1].sum()))
        geometry.add(image_id, runs)

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
        unlikely=tuple(geometry.unlikely),
        sha256=digest.hexdigest(),
        warnings=tuple(geometry.warnings()),
    )


class GeometryCheck:
    """Finds masks that are valid but do not have the shape of a car in an image of 1280 x 1918 pixels.

    It compares what the runs of a mask show with the real masks: coverage, position, and whether the foreground of one
    row lies under that of the row before. The last fails if masks were encoded in column order or at another width.
    """

    def __init__(self) -> None:
        self.unlikely: list[tuple[str, float]] = []
        """Image id and coverage of each mask that is not empty, but outside ``PLAUSIBLE_COVERAGE``."""
        self._masks = 0
        self._empty = 0
        self._misaligned: list[tuple[str, float]] = []
        self._misplaced: list[tuple[str, float, float]] = []
        self._strides = array("d")
        self._centers = array("d"), array("d")

    def add(self, image_id: str, runs_N2: NDArray[np.int64]) -> None:
        """Add a mask by its valid runs."""
        self._masks += 1
        coverage = int(runs_N2[:, 1].sum()) / _PIXELS
        if not coverage:
            self._empty += 1
            return
        if not _is_within(coverage, PLAUSIBLE_COVERAGE):
            self.unlikely.append((image_id, coverage))
        runs_N2 = _split_at_row_ends(runs_N2)
        stride = _row_stride(runs_N2)
        if stride is not None:
            self._strides.append(stride)
            if abs(stride - WIDTH) > _MAX_STRIDE_ERROR:
                self._misaligned.append((image_id, stride))
                return
        if _is_within(coverage, PLAUSIBLE_COVERAGE):
            row, column = _center(runs_N2)
            self._centers[0].append(row)
            self._centers[1].append(column)
            if not (_is_within(row, PLAUSIBLE_CENTER[0]) and _is_within(column, PLAUSIBLE_CENTER[1])):
                self._misplaced.append((image_id, row, column))

    def warnings(self) -> list[str]:
        """Return one warning for each kind of probable mistake, which names the first images."""
        return [
            warning
            for warning in (
                f"{self._empty} of {self._masks} masks are empty." if self._empty else "",
                self._coverage_warning(),
                self._stride_warning(),
                self._center_warning() or self._mean_center_warning(),
            )
            if warning
        ]

    def _coverage_warning(self) -> str:
        least, most = PLAUSIBLE_COVERAGE
        found = [f"{image_id} with {coverage:.1%}" for image_id, coverage in sorted(self.unlikely)]
        reason = f"cover less than {least:.0%} or more than {most:.0%} of their image"
        return self._warning(found, f"{reason} (inverted, or of another size?)")

    def _stride_warning(self) -> str:
        found = [f"{image_id} with {stride:.0f}" for image_id, stride in sorted(self._misaligned)]
        advice = f"Encode masks row by row, at {HEIGHT} x {WIDTH} pixels."
        typical = float(np.median(self._strides)) if self._strides else WIDTH
        if found:
            hint = "in column order" if round(typical) == HEIGHT else "in column order or at another width"
            return f"{self._warning(found, f'have rows that are not {WIDTH} pixels apart ({hint}?)')} {advice}"
        if len(self._strides) >= ANGLES and abs(typical - WIDTH) > _MAX_STRIDE_ERROR / 2:
            return f"The rows of the masks are {typical:.1f} pixels apart, not {WIDTH}. {advice}"
        return ""

    def _center_warning(self) -> str:
        found = [
            f"{image_id} at row {row:.0f}, column {column:.0f}" for image_id, row, column in sorted(self._misplaced)
        ]
        return self._warning(found, "are centered where no car was in the training images (shifted?)")

    def _mean_center_warning(self) -> str:
        """Return a warning if the masks are shifted on average, which shows smaller shifts than one mask does."""
        count = len(self._centers[0])
        if count < ANGLES:  # the column depends on the angle
            return ""
        means = [math.fsum(values) / count for values in self._centers]
        # Four standard errors, and a margin for another choice of cars.
        limits = [30 + 4 * deviation / math.sqrt(count / ANGLES) for deviation in _CAR_DEVIATION]
        if all(abs(m - usual) <= limit for m, usual, limit in zip(means, _USUAL_CENTER, limits, strict=True)):
            return ""
        return (
            f"The masks are centered at row {means[0]:.0f}, column {means[1]:.0f} on average; training masks at row "
            f"{_USUAL_CENTER[0]:.0f}, column {_USUAL_CENTER[1]:.0f} (shifted?)."
        )

    def _warning(self, found: list[str], problem: str) -> str:
        first = ", ".join(found[:_SHOWN])
        return (
            f"{len(found)} of {self._masks} masks {problem}: {first}{', ...' * (len(found) > _SHOWN)}." if found else ""
        )


def _is_within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


def _split_at_row_ends(runs_N2: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return runs of the same pixels of which none continues into the next row."""
    starts, lengths = runs_N2.T
    first_rows, last_rows = starts // WIDTH, (starts + lengths - 1) // WIDTH
    if np.array_equal(first_rows, last_rows):  # as in nearly every mask
        return runs_N2
    pieces = last_rows - first_rows + 1
    owners = np.repeat(np.arange(len(runs_N2)), pieces)
    rows = first_rows[owners] + np.arange(len(owners)) - (np.cumsum(pieces) - pieces)[owners]
    begin = np.maximum(starts[owners], rows * WIDTH)
    end = np.minimum((starts + lengths)[owners], (rows + 1) * WIDTH)
    return np.column_stack([begin, end - begin])


def _row_stride(runs_N2: NDArray[np.int64]) -> float | None:
    """Return the usual distance in pixels from the middle of a run to that of the next; None for too few runs.

    For a shape that changes slowly from row to row, it is the width of the image at which the mask was encoded. Short
    runs, such as those of antennas and wheels, are left out, so that most rows have one run.
    """
    starts, lengths = runs_N2.T
    long = lengths * 4 >= lengths.max()
    doubled = (2 * starts + lengths)[long]
    return float(np.median(np.diff(doubled))) / 2 if len(doubled) >= _MIN_RUNS else None


def _center(runs_N2: NDArray[np.int64]) -> tuple[float, float]:
    """Return the row and the column of the center of mass of runs that do not continue into the next row."""
    starts, lengths = runs_N2.T
    rows, columns = starts // WIDTH, starts % WIDTH
    area = int(lengths.sum())
    return int((rows * lengths).sum()) / area, int(((2 * columns + lengths) * lengths).sum()) / 2 / area


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
