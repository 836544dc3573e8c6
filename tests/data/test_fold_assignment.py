from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.competition.image_ids import format_image_id
from pipeline.data.fold_assignment import (
    HOLDOUT_FOLD,
    assign_folds,
    images_in_folds,
    mean_areas,
    read_folds,
    training_folds,
    write_folds,
)
from pipeline.errors import CarvanaError


def random_areas(cars: int, seed: int = 0) -> dict[str, float]:
    """Areas as spread as the competition's: 8.8 % to 41 % of the image, 21 % on average."""
    areas = np.random.default_rng(seed).lognormal(np.log(0.2), 0.25, cars).clip(0.088, 0.41)
    return {f"{number:012x}": float(area) for number, area in enumerate(areas)}


def cars_of(folds: dict[str, int], fold: int) -> list[str]:
    return [car for car, its_fold in folds.items() if its_fold == fold]


@given(cars=st.integers(1, 60), count=st.integers(2, 8), holdout=st.integers(0, 12), seed=st.integers(0, 3))
def test_every_car_has_one_fold_and_every_fold_its_share(cars: int, count: int, holdout: int, seed: int) -> None:
    areas = random_areas(cars)
    if cars - holdout < count:
        with pytest.raises(CarvanaError, match=rf"{cars} cars.*folds\.count"):
            assign_folds(areas, count, holdout, seed)
        return
    folds = assign_folds(areas, count, holdout, seed)
    assert list(folds) == sorted(areas)
    assert set(folds.values()) == set(range(count)) | ({HOLDOUT_FOLD} if holdout else set())
    assert len(cars_of(folds, HOLDOUT_FOLD)) == holdout
    sizes = [len(cars_of(folds, fold)) for fold in range(count)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_folds_and_held_out_cars_are_alike_in_area(seed: int) -> None:
    areas = random_areas(318, seed)
    folds = assign_folds(areas, 5, 16, seed)
    means = [np.mean([areas[car] for car in cars_of(folds, fold)]) for fold in (HOLDOUT_FOLD, 0, 1, 2, 3, 4)]
    mean = np.mean(list(areas.values()))
    assert np.ptp(means[1:]) < 0.02 * mean
    assert abs(means[0] - mean) < 0.05 * mean


def test_no_car_is_in_training_and_validation() -> None:
    areas = random_areas(12)
    image_ids = [format_image_id(car, angle) for car in areas for angle in range(1, 17)]
    folds = assign_folds(areas, 3, 2, 0)
    parts = {fold: images_in_folds(image_ids, folds, [fold]) for fold in (HOLDOUT_FOLD, 0, 1, 2)}
    assert sorted(image_id for part in parts.values() for image_id in part) == sorted(image_ids)
    for fold in range(3):
        training = images_in_folds(image_ids, folds, training_folds(fold, 3))
        cars = {image_id[:12] for image_id in training}
        assert len(training) == 16 * len(cars)
        for other in (fold, HOLDOUT_FOLD):
            assert cars.isdisjoint(image_id[:12] for image_id in parts[other])


def test_folds_depend_on_the_seed_only() -> None:
    areas = random_areas(30)
    assert assign_folds(areas, 4, 3, 7) == assign_folds(dict(reversed(areas.items())), 4, 3, 7)
    assert assign_folds(areas, 4, 3, 7) != assign_folds(areas, 4, 3, 8)


def test_cars_of_equal_area_are_assigned() -> None:
    assert sorted(assign_folds(dict.fromkeys("abcdef", 0.2), 3, 0, 0).values()) == [0, 0, 1, 1, 2, 2]


def test_area_of_a_car_is_the_mean_over_its_masks() -> None:
    first, second, other = "00087a6bd4dc_01", "00087a6bd4dc_02", "02159e548029_01"
    masks = {image_id: np.zeros((4, 5), np.uint8) for image_id in (first, second, other)}
    masks[first][:2] = 1
    masks[second][:1] = 1
    assert mean_areas(masks, masks.__getitem__) == {"00087a6bd4dc": 7.5, "02159e548029": 0}


def test_folds_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "folds.csv"
    write_folds(path, {"b": 1, "a": HOLDOUT_FOLD, "c": 0})
    assert path.read_bytes() == b"car,fold\na,-1\nb,1\nc,0\n"
    assert read_folds(path) == {"a": HOLDOUT_FOLD, "b": 1, "c": 0}
    path.write_bytes(b'\xef\xbb\xbf"car","fold"\r\n"a",-1\r\n')  # as a spreadsheet saves it
    assert read_folds(path) == {"a": HOLDOUT_FOLD}


@pytest.mark.parametrize(
    "damage", [None, b"", b"car,fold\n", b"car;fold\na;1\n", b"car,fold\na,1\nb", b"car,fold\na,x\n", b"\xff\xfe"]
)
def test_a_damaged_folds_csv_is_named(tmp_path: Path, damage: bytes | None) -> None:
    path = tmp_path / "folds.csv"
    if damage is not None:
        path.write_bytes(damage)
    with pytest.raises(CarvanaError, match=r"folds\.csv"):
        read_folds(path)


def test_a_car_that_folds_csv_lacks_is_named() -> None:
    with pytest.raises(CarvanaError, match="02159e548029"):
        images_in_folds(["02159e548029_01"], {"00087a6bd4dc": 0}, [0])
