"""Validate, compare and hash full-size submissions, as ``carvana submit`` does before it sends one."""

import gzip
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.timing import Row, compare
from pipeline.competition.image_ids import ANGLES, format_image_id, image_filename
from pipeline.submission import csv_file, validation

CARS = 6254
"""Cars in the competition's test set, with 16 images each."""

TINY_CARS = 10

TARGET = 2000
"""Rows per second that validation should reach."""

RUNS = 650
"""Runs per mask, which give about 8 KB of text, as for the competition's masks."""


@dataclass(frozen=True)
class Check:
    """Validate a CSV."""

    csv: Path
    cars: int = CARS

    def __call__(self) -> None:
        validation.validate_submission(self.csv, image_ids(self.cars))


@dataclass(frozen=True)
class Compare:
    """Score one submission against another."""

    csv: Path
    other: Path

    def __call__(self) -> None:
        validation.score_submission(self.csv, self.other)


@dataclass(frozen=True)
class Hash:
    """Hash the content, to prove that the file sent is the one validated."""

    csv: Path

    def __call__(self) -> None:
        csv_file.content_digest(self.csv)


@dataclass(frozen=True)
class Read:
    """Decompress and split into lines, the least that any check must do."""

    csv: Path

    def __call__(self) -> None:
        with gzip.open(self.csv) as stream:
            for _ in stream:
                pass


def run(folder: Path, tiny: bool = False) -> list[Row]:
    """Return validating, comparing and hashing 100,064 rows, one item being a row."""
    cars = TINY_CARS if tiny else CARS
    with tempfile.TemporaryDirectory() as temporary:
        csv, other = Path(temporary) / "submission.csv.gz", Path(temporary) / "other.csv.gz"
        write(csv, 0, cars)
        write(other, 1, cars)
        count = cars * ANGLES
        rows = [
            compare(f"check {count} rows / read them", Check(csv, cars), Read(csv), count, 1, warm=False),
            compare(f"compare {count} rows twice / read once", Compare(csv, other), Read(csv), count, 1, warm=False),
            compare(f"hash {count} rows / read them", Hash(csv), Read(csv), count, 1, warm=False),
        ]
    for row in rows:
        print(f"{row.name}: {1000 / row.ours_ms:,.0f} rows per second on one core (target for the check: {TARGET:,})")
    return rows


def image_ids(cars: int = CARS) -> list[str]:
    """Return the image ids of ``cars`` cars, by default as many as in the competition's test set."""
    return [format_image_id(f"{car:012x}", angle) for car in range(cars) for angle in range(1, ANGLES + 1)]


def write(csv: Path, offset: int, cars: int = CARS, *, backwards: bool = False) -> None:
    """Write a gzipped submission; ``offset`` varies the masks."""
    texts = [mask_text(number + offset) for number in range(64)]
    ids = image_ids(cars)[:: -1 if backwards else 1]
    with gzip.open(csv, "wt", compresslevel=1, encoding="utf-8") as stream:
        stream.write(f"{csv_file.CSV_HEADER}\n")
        stream.writelines(
            f"{image_filename(image_id)},{texts[number % len(texts)]}\n" for number, image_id in enumerate(ids)
        )


def mask_text(seed: int) -> str:
    """Return a run-length code as long as that of a real mask."""

    def pairs() -> Iterator[str]:
        for row in range(RUNS):
            yield f"{(row + 300) * 1918 + 400 + (row * seed) % 97} {900 + (row * (seed + 3)) % 89}"

    return " ".join(pairs())
