"""Intervals cover what they say, on simulated cars whose true difference is known."""

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.competition.interval import FEWEST_CARS, intervals

ANGLES = 16
SIMULATIONS = 2000
TRUTH = 0.0003
"""Mean difference of Dice; of the size that a flip or a fold makes."""


def cars_of(kind: str, cars: int, random: np.random.Generator) -> NDArray[np.float64]:
    """Differences of Dice by car and simulation, of mean ``TRUTH``: each car has its own, and its images scatter."""
    shape = (cars, SIMULATIONS)
    spread = {
        "normal": lambda: random.normal(0, 1, shape),
        "heavy tails": lambda: random.standard_t(5, shape),
        "skewed": lambda: random.exponential(1, shape) - 1,
        "very skewed": lambda: random.lognormal(0, 1, shape) - np.exp(0.5),
        "few cars gain much": lambda: np.where(random.random(shape) < 0.1, 5, 0) - 0.5 + random.normal(0, 1, shape),
    }[kind]()
    return TRUTH * (1 + spread)


def coverage(kind: str, cars: int, images_C: NDArray[np.int64]) -> float:
    random = np.random.default_rng([cars, len(kind)])
    noise = random.normal(0, 0.5 * TRUTH, (cars, SIMULATIONS))
    sums = cars_of(kind, cars, random) * images_C[:, None] + noise * np.sqrt(images_C)[:, None]
    low, high = intervals(sums, images_C).T
    return float(((low <= TRUTH) & (high >= TRUTH)).mean())


@pytest.mark.slow
class TestCoverage:
    @pytest.mark.parametrize("cars", [8, 16, 32, 300])
    def test_of_normal_differences_is_93_to_97_percent(self, cars: int) -> None:
        assert 0.93 <= coverage("normal", cars, np.full(cars, ANGLES)) <= 0.97

    @pytest.mark.parametrize("cars", [8, 16, 32, 300])
    def test_where_images_are_missing(self, cars: int) -> None:
        images = np.random.default_rng(cars).integers(10, ANGLES + 1, cars)
        assert 0.93 <= coverage("normal", cars, images) <= 0.97

    @pytest.mark.parametrize("kind", ["heavy tails", "skewed", "very skewed", "few cars gain much"])
    @pytest.mark.parametrize("cars", [8, 16, 32, 300])
    def test_of_other_differences_is_what_design_md_says(self, cars: int, kind: str) -> None:
        # No interval covers skewed values well at 8 cars; the page tells the figures, and these are its floors.
        covered = coverage(kind, cars, np.full(cars, ANGLES))
        print(f"{kind}, {cars} cars: {covered:.1%}")
        assert covered >= {8: 0.86, 16: 0.86, 32: 0.88, 300: 0.92}[cars]


def test_fewer_cars_have_none() -> None:
    few = FEWEST_CARS - 1
    assert np.isnan(intervals(np.ones((few, 3)), np.full(few, ANGLES))).all()
    assert not np.isnan(intervals(np.random.default_rng(0).random((few + 1, 3)), np.full(few + 1, ANGLES))).any()


def test_no_difference_at_all() -> None:
    assert (intervals(np.zeros((9, 2)), np.full(9, ANGLES)) == 0).all()


def test_the_same_values_have_the_same_bounds_whatever_stands_beside_them() -> None:
    values = np.random.default_rng(0).normal(0, 1, (12, 700))
    together = intervals(values, np.full(12, ANGLES))
    assert np.array_equal(together, intervals(values, np.full(12, ANGLES)))
    alone = np.concatenate([intervals(values[:, [k]], np.full(12, ANGLES)) for k in (0, 300, 699)])
    assert np.allclose(together[[0, 300, 699]], alone, rtol=1e-9)


def test_bounds_move_and_grow_with_the_values() -> None:
    values, images = np.random.default_rng(1).normal(0, 1, (10, 1)), np.full(10, ANGLES)
    bounds = intervals(values, images)
    assert np.allclose(intervals(3 * values + 2 * ANGLES, images), 3 * bounds + 2)
    assert bounds[0, 0] < values.mean() / ANGLES < bounds[0, 1]


def test_the_mean_is_one_over_images_not_over_cars() -> None:
    images = np.array([16, 16, 16, 16, 16, 16, 16, 1])
    sums = images * np.array([0.1] * 7 + [5.0])
    low, high = intervals(sums[:, None], images)[0]
    assert low < sums.sum() / images.sum() < high


def test_one_car_that_differs_does_not_end_nowhere() -> None:
    sums = np.zeros((8, 1))
    sums[3] = 1.0
    low, high = intervals(sums, np.full(8, ANGLES))[0]
    assert np.isfinite([low, high]).all()
    assert low <= 0 <= high
