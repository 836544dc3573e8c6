"""Validate and score a submission: a CSV with one row per image, plain, gzipped or zipped.

A full submission has 100,064 rows and about 0.8 GB of text, so it is read as a stream, row by row. Rows are numbered as
in editors and spreadsheets: the header is row 1.
"""

import hashlib
import io
import math
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.competition import rle
from pipeline.competition.dice import ConfusionCounts, confusion_counts_from_runs
from pipeline.competition.image_ids import ANGLES, HEIGHT, WIDTH, image_filename, parse_image_id
from pipeline.errors import CarvanaError
from pipeline.submission.csv_file import check_header, parse_line, read_lines, read_rows

ProgressBar = Callable[[Iterator[Any]], Iterable[Any]]
"""Wraps an iterator of rows to show progress, as tqdm does."""

PLAUSIBLE_COVERAGE = 0.05, 0.5
"""Range of mask coverage, 0 to 1, that is plausible for a car; the training masks cover 0.088 to 0.410, so that any of
them inverted covers more than 0.5."""

_MIN_RUNS = 50
"""Fewest long runs from which the distance of a mask's rows is estimated."""

_STRIDE_ERRORS = 1.25, 2.25
"""How far the estimated distance of a mask's rows may be from the width, in pixels: for most masks, and for any.

Of 800 real masks all are within 1, and 788 within 0.5.
"""

_RARE = 0.005
"""Share of the masks that may be outside the first of ``_STRIDE_ERRORS`` without a warning."""

_USUAL_CENTERS = (
    *((697, 947), (682, 839), (658, 833), (637, 894), (629, 966), (627, 1030), (634, 1076), (646, 1067)),
    *((661, 964), (648, 828), (636, 805), (627, 845), (628, 909), (636, 983), (656, 1049), (679, 1051)),
)
"""Mean row and column of a mask's center at each angle, from 1; measured on 50 cars of the competition."""

_MAX_OFFSET = 250, 220
"""How far the row and the column of a mask's center may be from the usual ones; 800 real masks are within 173, 153."""

_CAR_OFFSET = 83, 20
"""Standard deviation over the cars of the mean offset of a car's 16 masks, in rows and columns."""

_MAX_LEAN = 5.0
"""Largest mean of ``_MaskShape.lean``; the means of 50 real cars are between -42 and -14."""

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


class _MaskShape(NamedTuple):
    """What the runs of a mask that is not empty show of its shape, in pixels."""

    coverage: float
    """Share of foreground pixels, 0 to 1."""
    stride: float
    """Usual distance from the middle of a long run to that of the next: the width of the image that was encoded.

    A car changes little from row to row, and most rows have one long run. It is ``WIDTH`` if the distance differs by
    less than 1.25, or if there are fewer than 50 long runs.
    """
    row: float
    """Row of the center of mass."""
    column: float
    """Column of the center of mass."""
    lean: float
    """Mean row of the long runs less ``row``: negative if the mask is wider at the bottom, as a car is."""


def _measure(runs_N2: NDArray[np.int64]) -> _MaskShape:
    """Return the shape of a mask by its valid runs, of which there must be at least one.

    It takes 25 microseconds for the 780 runs of a real mask; a full submission has 100,064 masks.
    """
    starts, lengths = np.ascontiguousarray(runs_N2.T)
    area = int(lengths.sum())
    doubled_middles = 2 * starts + lengths
    rows = doubled_middles // (2 * WIDTH)
    columns = (doubled_middles >> 1) - rows * WIDTH
    columns[lengths > WIDTH] = WIDTH // 2  # full rows
    row, column = int(rows @ lengths) / area, int(columns @ lengths) / area
    # Without short runs, such as those of antennas and wheels, most rows have one run.
    long = np.flatnonzero(lengths * (2 * len(lengths)) >= area)
    long_rows, long_middles = rows[long], doubled_middles[long]
    lean = int(long_rows.sum()) / len(long) - row
    return _MaskShape(area / _PIXELS, _stride(long_middles[1:] - long_middles[:-1]), row, column, lean)


def _stride(doubled_steps: NDArray[np.int64]) -> float:
    """Return the median step from run to run, or ``WIDTH`` where ``_MaskShape.stride`` says so."""
    half = len(doubled_steps) // 2
    largest = int(2 * _STRIDE_ERRORS[0])
    off = abs(doubled_steps - 2 * WIDTH) > largest
    if len(doubled_steps) < _MIN_RUNS or np.count_nonzero(off) < half:
        return WIDTH
    return float(np.partition(doubled_steps, half)[half]) / 2


class GeometryCheck:
    """Finds masks that are valid but do not have the shape of a car in an image of 1280 x 1918 pixels.

    It compares the runs of a mask with the real masks: coverage, the position at this angle, and the distance of the
    rows, which is wrong if masks were encoded in column order or at another width. Masks are not decoded.
    """

    def __init__(self) -> None:
        self.unlikely: list[tuple[str, float]] = []
        """Image id and coverage of each mask that is not empty, but outside ``PLAUSIBLE_COVERAGE``."""
        self._masks = 0
        self._empty = 0
        self._misaligned: dict[str, float] = {}
        self._misplaced: list[tuple[str, float, float]] = []
        # Number of masks with a position, and the sums of their values; those of columns by angle.
        self._placed = 0
        self._lean = 0.0
        self._rows = 0.0
        self._columns = [0.0] * ANGLES

    def add(self, image_id: str, runs_N2: NDArray[np.int64]) -> None:
        """Add a mask by its valid runs."""
        self._masks += 1
        if not len(runs_N2):
            self._empty += 1
            return
        shape = _measure(runs_N2)
        least, most = PLAUSIBLE_COVERAGE
        if not least <= shape.coverage <= most:
            self.unlikely.append((image_id, shape.coverage))
        if shape.coverage > most:
            return
        if abs(shape.stride - WIDTH) > _STRIDE_ERRORS[0]:
            self._misaligned[image_id] = shape.stride
            return
        if shape.coverage < least:
            return
        angle = parse_image_id(image_id)[1] - 1
        usual_row, usual_column = _USUAL_CENTERS[angle]
        rows, columns = shape.row - usual_row, shape.column - usual_column
        self._placed += 1
        self._lean += shape.lean
        self._rows += rows
        self._columns[angle] += columns
        if abs(rows) > _MAX_OFFSET[0] or abs(columns) > _MAX_OFFSET[1]:
            self._misplaced.append((image_id, shape.row, shape.column))

    def warnings(self) -> list[str]:
        """Return one warning for each kind of probable mistake, which names the first images."""
        found = [
            f"{self._empty} of {self._masks} masks are empty." if self._empty else "",
            self._stride_warning(),
            self._coverage_warning(),
            self._center_warning(),
            *self._average_warnings(),
        ]
        return [warning for warning in found if warning]

    def _stride_warning(self) -> str:
        found = self._misaligned
        if len(found) <= _RARE * self._masks:
            found = {key: stride for key, stride in found.items() if abs(stride - WIDTH) > _STRIDE_ERRORS[1]}
        if not found:
            return ""
        in_columns = abs(float(np.median(list(found.values()))) - HEIGHT) < 5
        hint = "in column order" if in_columns else "in column order or at another width"
        images = [f"{image_id} with {stride:.0f}" for image_id, stride in sorted(found.items())]
        problem = f"have rows that are not {WIDTH} pixels apart ({hint}?)"
        return f"{self._warning(images, problem)} Encode masks row by row, at {HEIGHT} x {WIDTH} pixels."

    def _coverage_warning(self) -> str:
        least, most = PLAUSIBLE_COVERAGE
        found = [(key, coverage) for key, coverage in sorted(self.unlikely) if key not in self._misaligned]
        images = [f"{image_id} with {coverage:.1%}" for image_id, coverage in found]
        problem = f"cover less than {least:.0%} or more than {most:.0%} of their image (inverted, or of another size?)"
        return self._warning(images, problem)

    def _center_warning(self) -> str:
        images = [
            f"{image_id} at row {row:.0f}, column {column:.0f}" for image_id, row, column in sorted(self._misplaced)
        ]
        return self._warning(images, "are far from where cars are at their angle (shifted, mirrored, or swapped?)")

    def _average_warnings(self) -> Iterator[str]:
        """Yield warnings of what many masks show better than one; none for fewer than the images of one car."""
        count = self._placed
        if count < ANGLES:
            return
        # Four standard errors, and a margin for another choice of cars.
        row_limit, column_limit = (30 + 4 * deviation / math.sqrt(count / ANGLES) for deviation in _CAR_OFFSET)
        row, column = self._rows / count, math.fsum(self._columns) / count
        if abs(row) > row_limit or abs(column) > column_limit:
            yield (
                f"On average, the masks are {row:+.0f} rows and {column:+.0f} columns from where cars are at their "
                "angle (shifted?)."
            )
        elif math.fsum(map(abs, self._columns)) / count > column_limit:  # offsets of opposite angles cancel out above
            yield "The masks are not where cars are at their angle (mirrored, or swapped?)."
        if self._lean / count > _MAX_LEAN:
            yield "The masks are wider at the top than at the bottom (upside down?)."

    def _warning(self, images: list[str], problem: str) -> str:
        if not images:
            return ""
        first = "first " if len(images) > _SHOWN else ""
        return f"{len(images)} of {self._masks} masks {problem}: {first}{', '.join(images[:_SHOWN])}."


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
