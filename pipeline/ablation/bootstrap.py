"""How sure a mean Dice, or a difference of two, is: intervals by resampling cars.

The images of one car resemble one another, so that cars are drawn, never images. The bootstrap is studentized
(bootstrap-t: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 12; Davison and Hinkley, Bootstrap
Methods and their Application, 1997, chapter 5): each resample is measured by its own standard error, so that intervals
are wide enough where cars are few. The plain percentile bootstrap covers 90 % instead of 95 % at 8 cars.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

MIN_CLUSTERS = 8
"""Cars below which no interval is shown: nobody can tell how 7 values are distributed.

As many have to differ from 0 at all: from cars on which nothing happened nothing can be drawn but more of the same.
"""

_RESAMPLES = 4999
_BOUNDS = (0.025, 0.975)
_CONFIDENCE = 0.95
_SEED = 0
_COLUMNS_AT_ONCE = 256

_MIN_RELATIVE_SE = 0.1
"""Least standard error of a resample, as a part of that of all cars.

Where few cars differ at all, some resamples hold none of them, and dividing by their error would end nowhere.
"""


def studentized_ci(sums_CK: NDArray[np.float64], images_C: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the 95 % intervals of K means over images, (K, 2): lower and upper bound, each for itself.

    ``sums_CK`` holds a value's sum over the images of each of C cars, for K quantities, such as paired differences of
    Dice; ``images_C`` how many images each car has. The same values give the same bounds. NaN where fewer than
    ``FEWEST_CARS`` cars have a value other than 0.
    """
    bounds_K2 = np.full((sums_CK.shape[1], 2), np.nan)
    for columns, mean_K, error_K, studentized_BK in _resampled(sums_CK, images_C):
        low_K, high_K = np.quantile(studentized_BK, _BOUNDS, axis=0)
        bounds_K2[columns] = np.stack([mean_K - high_K * error_K, mean_K - low_K * error_K], axis=1)
    return bounds_K2


def simultaneous_lower_bounds(sums_CK: NDArray[np.float64], images_C: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return lower bounds (K,) of the means that hold for all K at once, 95 % sure; values as `intervals` takes them.

    Of a thousand intervals that hold each for itself some fifty do not; whoever picks among them picks those. Here the
    largest of all errors is resampled (max-t: Westfall and Young, Resampling-Based Multiple Testing, 1993).
    """
    bounds_K, worst_B = np.full(sums_CK.shape[1], np.nan), np.full(_RESAMPLES, -np.inf)
    errors_K = np.zeros(sums_CK.shape[1])
    for columns, mean_K, error_K, studentized_BK in _resampled(sums_CK, images_C):
        np.maximum(worst_B, studentized_BK.max(axis=1), out=worst_B)
        bounds_K[columns], errors_K[columns] = mean_K, error_K
    return bounds_K - np.quantile(worst_B, _CONFIDENCE) * errors_K if np.isfinite(worst_B[0]) else bounds_K


_Part = tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]
"""Columns with their means (K,), standard errors (K,) and studentized resamples (B, K)."""


def _resampled(sums_CK: NDArray[np.float64], images_C: NDArray[np.int64]) -> Iterator[_Part]:
    """Yield some columns at a time of those on which enough cars differ."""
    told = np.flatnonzero(np.count_nonzero(sums_CK, axis=0) >= MIN_CLUSTERS)
    drawn_BC = _resample_counts(len(images_C)) if len(told) else np.empty(0)
    for start in range(0, len(told), _COLUMNS_AT_ONCE):
        columns = told[start : start + _COLUMNS_AT_ONCE]
        yield columns, *_studentized(sums_CK[:, columns], images_C, drawn_BC)


def _studentized(
    sums_CK: NDArray[np.float64], images_C: NDArray[np.int64], drawn_BC: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    mean_K = sums_CK.sum(axis=0) / images_C.sum()
    # Around the mean, so that squares lose no digits to each other.
    rest_CK = sums_CK - np.outer(images_C, mean_K)
    error_K = _standard_error(np.ones((1, len(images_C))), rest_CK, images_C)[1][0]
    moved_BK, errors_BK = _standard_error(drawn_BC, rest_CK, images_C)
    least_K = np.where(error_K > 0, _MIN_RELATIVE_SE * error_K, 1.0)
    return mean_K, error_K, moved_BK / np.maximum(errors_BK, least_K)


def _standard_error(
    drawn_BC: NDArray[np.float64], rest_CK: NDArray[np.float64], images_C: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return each resample's mean and standard error, (B, K) both.

    The mean is a ratio, sums over numbers of images, since cars may lack images; its error is that of the residuals.
    """
    cars = len(images_C)
    images_B1 = (drawn_BC @ images_C)[:, None]
    mean_BK = drawn_BC @ rest_CK / images_B1
    # The sum over cars of (rest - mean * images) squared, multiplied out so that no (B, C, K) comes to be.
    crossed_BK = drawn_BC @ (rest_CK * images_C[:, None])
    squares_BK = drawn_BC @ rest_CK**2 - 2 * mean_BK * crossed_BK + mean_BK**2 * (drawn_BC @ images_C**2)[:, None]
    return mean_BK, np.sqrt(np.maximum(squares_BK, 0) * cars / (cars - 1)) / images_B1


def _resample_counts(cars: int) -> NDArray[np.float64]:
    """Return how often each resample draws each car, (B, C); the same for all quantities, so that they stay paired."""
    generator = np.random.default_rng(_SEED)
    return generator.multinomial(cars, np.full(cars, 1 / cars), size=_RESAMPLES).astype(np.float64)
