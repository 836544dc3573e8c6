"""Assign cars to folds. All images of a car are in one fold; otherwise out-of-fold scores would leak."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.competition.image_ids import car_id
from pipeline.errors import CarvanaError
from pipeline.utils.files import read_versioned, write_text

HOLDOUT_FOLD = -1
"""Fold of the cars that no net trains on."""

FoldByCar = Mapping[str, int]
"""Fold by car."""


def mean_areas(image_ids: Iterable[str], mask: Callable[[str], NDArray[np.uint8]]) -> dict[str, float]:
    """Return the mean area of each car's masks, in pixels."""
    areas: dict[str, list[int]] = {}
    for image_id in tqdm(image_ids, desc="Measuring masks", unit="image"):
        areas.setdefault(car_id(image_id), []).append(int(np.count_nonzero(mask(image_id))))
    return {car: sum(values) / len(values) for car, values in areas.items()}


def assign_folds(area_by_car: Mapping[str, float], count: int, holdout_cars: int, seed: int) -> dict[str, int]:
    """Return the fold of every car, -1 for held-out ones, such that folds have similar mask areas.

    Cars are sorted by area. Held-out cars are evenly spaced; of the others, each group of ``count`` neighbors is
    assigned one per fold, in random order. Raises CarvanaError if a fold would be empty.
    """
    cars = sorted(area_by_car, key=lambda car: (area_by_car[car], car))
    if len(cars) - holdout_cars < count:
        raise CarvanaError(
            f"{len(cars)} cars are too few for {count} folds and {holdout_cars} held-out cars. "
            "Lower folds.count or folds.holdout_cars."
        )
    random = np.random.default_rng(seed)
    held_out = {cars[place] for place in _spread(len(cars), holdout_cars, random)}
    dealt = [car for car in cars if car not in held_out]
    order = [fold for _ in range(0, len(dealt), count) for fold in random.permutation(count)]
    folds = dict.fromkeys(held_out, HOLDOUT_FOLD) | {car: int(f) for car, f in zip(dealt, order, strict=False)}
    return dict(sorted(folds.items()))


def write_folds(path: Path, folds: FoldByCar) -> None:
    """Write ``car,fold`` rows, sorted by car."""
    write_text(path, "car,fold\n" + "".join(f"{car},{fold}\n" for car, fold in sorted(folds.items())))


def read_folds(path: Path) -> dict[str, int]:
    """Return the fold of every car; raises CarvanaError if the file is missing or invalid."""
    try:
        rows = csv.DictReader(io.StringIO(read_versioned(path)))
        folds = {row["car"]: int(row["fold"]) for row in rows}
        if not folds:
            raise ValueError("it has no rows")
        return folds
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CarvanaError(f"{path} is not a valid table of folds ({error}). Run 'dvc repro --force folds'.") from error


def images_in_folds(image_ids: Iterable[str], folds: FoldByCar, wanted: Iterable[int]) -> list[str]:
    """Return the images whose car is in one of the ``wanted`` folds."""
    chosen = set(wanted)
    try:
        return [image_id for image_id in image_ids if folds[car_id(image_id)] in chosen]
    except KeyError as error:
        raise CarvanaError(f"folds.csv has no car {error}. Run 'dvc repro --force folds'.") from error


def training_folds(fold: int, count: int) -> list[int]:
    """Return the folds that the net of ``fold`` trains on."""
    return [other for other in range(count) if other != fold]


def _spread(total: int, wanted: int, random: np.random.Generator) -> list[int]:
    """Return ``wanted`` of ``total`` indices: a random one from each of as many equal ranges."""
    edges = np.linspace(0, total, wanted + 1).round().astype(int)
    return [int(random.integers(low, high)) for low, high in pairwise(edges)]
