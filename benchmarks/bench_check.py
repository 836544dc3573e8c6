"""Checking, comparing and keeping full-size submissions, as `carvana submit` does before it sends."""

import gzip
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.timing import Row, compare
from pipeline.competition.image_ids import ANGLES, format_image_id, image_filename
from pipeline.submission import csv_file, validation

CARS = 6254
"""Of the competition's test set; 16 images each."""

TINY_CARS = 10

AIM = 2000
"""Rows a second."""

RUNS = 650
"""About 8 KB of text, as the competition's masks have."""


@dataclass(frozen=True)
class Check:
    """What refuses an unsound CSV."""

    csv: Path
    cars: int = CARS

    def __call__(self) -> None:
        validation.validate_submission(self.csv, image_ids(self.cars))


@dataclass(frozen=True)
class Compare:
    """Mean Dice between two submissions."""

    csv: Path
    last: Path

    def __call__(self) -> None:
        validation.score_submission(self.csv, self.last)


@dataclass(frozen=True)
class Hash:
    """What proves that the copy to send is what was checked."""

    csv: Path

    def __call__(self) -> None:
        csv_file.content_digest(self.csv)


@dataclass(frozen=True)
class Read:
    """Unpacking and splitting into lines: what any check must do."""

    csv: Path

    def __call__(self) -> None:
        with gzip.open(self.csv) as stream:
            for _ in stream:
                pass


def run(folder: Path, tiny: bool = False) -> list[Row]:
    """Return the check of 100,064 rows and the comparison of two such files, a row being an item."""
    cars = TINY_CARS if tiny else CARS
    with tempfile.TemporaryDirectory() as temporary:
        csv, last = Path(temporary) / "submission.csv.gz", Path(temporary) / "last.csv.gz"
        write(csv, 0, cars)
        write(last, 1, cars)
        count = cars * ANGLES
        rows = [
            compare(f"check {count} rows / read them", Check(csv, cars), Read(csv), count, 1, warm=False),
            compare(f"compare {count} rows twice / read once", Compare(csv, last), Read(csv), count, 1, warm=False),
            compare(f"hash {count} rows / read them", Hash(csv), Read(csv), count, 1, warm=False),
        ]
    for row in rows:
        print(f"{row.name}: {1000 / row.ours_ms:,.0f} rows a second on one core (aim for the check: {AIM:,})")
    return rows


def image_ids(cars: int = CARS) -> list[str]:
    """Return ids of so many cars; by default as many as the competition's test set has."""
    return [format_image_id(f"{car:012x}", angle) for car in range(cars) for angle in range(1, ANGLES + 1)]


def write(csv: Path, offset: int, cars: int = CARS, *, backwards: bool = False) -> None:
    """Write a gzipped submission of full size."""
    texts = [mask_text(number + offset) for number in range(64)]
    ids = image_ids(cars)[:: -1 if backwards else 1]
    with gzip.open(csv, "wt", compresslevel=1, encoding="utf-8") as stream:
        stream.write(f"{csv_file.CSV_HEADER}\n")
        stream.writelines(
            f"{image_filename(image_id)},{texts[number % len(texts)]}\n" for number, image_id in enumerate(ids)
        )


def mask_text(seed: int) -> str:
    """Return a run-length code as long as a car's."""

    def pairs() -> Iterator[str]:
        for row in range(RUNS):
            yield f"{(row + 300) * 1918 + 400 + (row * seed) % 97} {900 + (row * (seed + 3)) % 89}"

    return " ".join(pairs())
