"""Assign cars to folds. All images of a car are in one fold, so that no net is validated on a car it trained on."""

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
"""Fold of each car id: 0 to K - 1, or ``HOLDOUT_FOLD``."""


def mean_areas(image_ids: Iterable[str], mask: Callable[[str], NDArray[np.uint8]]) -> dict[str, float]:
    """Return the mean mask area of each car, in pixels; ``mask`` returns the mask (H, W) of an image id."""
    areas: dict[str, list[int]] = {}
    for image_id in tqdm(image_ids, desc="Measuring masks", unit="image"):
        areas.setdefault(car_id(image_id), []).append(int(np.count_nonzero(mask(image_id))))
    return {car: sum(values) / len(values) for car, values in areas.items()}


def assign_folds(area_by_car: Mapping[str, float], count: int, holdout_cars: int, seed: int) -> dict[str, int]:
    """Return the fold of each car, with similar mask areas in all folds and in the held-out cars.

    Cars are sorted by area. Held-out cars are drawn at even distances. Of the others, each group of ``count``
    neighbors is assigned one to each fold, in random order. Raises CarvanaError if there are too few cars to fill the
    folds.
    """
    cars = sorted(area_by_car, key=lambda car: (area_by_car[car], car))
    if len(cars) - holdout_cars < count:
        raise CarvanaError(
            f"{len(cars)} cars are too few for {count} folds and {holdout_cars} held-out cars. "
            "Lower folds.count or folds.holdout_cars."
        )
    rng = np.random.default_rng(seed)
    held_out = {cars[index] for index in _stratified_indices(len(cars), holdout_cars, rng)}
    others = [car for car in cars if car not in held_out]
    order = [fold for _ in range(0, len(others), count) for fold in rng.permutation(count)]
    folds = dict.fromkeys(held_out, HOLDOUT_FOLD) | {car: int(f) for car, f in zip(others, order, strict=False)}
    return dict(sorted(folds.items()))


def write_folds(path: Path, folds: FoldByCar) -> None:
    """Write folds.csv: columns ``car`` and ``fold``, sorted by car."""
    write_text(path, "car,fold\n" + "".join(f"{car},{fold}\n" for car, fold in sorted(folds.items())))


def read_folds(path: Path) -> dict[str, int]:
    """Return the fold of each car in folds.csv; raises CarvanaError if the file is missing or not valid."""
    try:
        rows = csv.DictReader(io.StringIO(read_versioned(path)))
        folds = {row["car"]: int(row["fold"]) for row in rows}
        if not folds:
            raise ValueError("it has no rows")
        return folds
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CarvanaError(f"{path} is not a valid folds.csv ({error}). Run 'dvc repro --force folds'.") from error


def images_in_folds(image_ids: Iterable[str], folds: FoldByCar, wanted: Iterable[int]) -> list[str]:
    """Return the images whose car is in one of the ``wanted`` folds; raises CarvanaError if a car has no fold."""
    chosen = set(wanted)
    try:
        return [image_id for image_id in image_ids if folds[car_id(image_id)] in chosen]
    except KeyError as error:
        raise CarvanaError(f"folds.csv has no car {error}. Run 'dvc repro --force folds'.") from error


def training_folds(fold: int, count: int) -> list[int]:
    """Return the folds that the net of ``fold`` trains on: all of ``count`` but its own."""
    return [other for other in range(count) if other != fold]


def _stratified_indices(total: int, wanted: int, rng: np.random.Generator) -> list[int]:
    """Return ``wanted`` of the indices below ``total``: a random one from each of ``wanted`` equal intervals."""
    edges = np.linspace(0, total, wanted + 1).round().astype(int)
    return [int(rng.integers(low, high)) for low, high in pairwise(edges)]
