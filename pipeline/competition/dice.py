"""How well a predicted mask fits the true one: Dice as Kaggle scores it, intersection over union, pixel accuracy."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.competition.rle import MaskLike


class ConfusionCounts(NamedTuple):
    """The pixel counts of one image that every score follows from."""

    intersection: int
    """Pixels that are car in both masks."""
    predicted: int
    """Pixels that are car in the prediction."""
    true: int
    """Pixels that are car in truth."""
    pixels: int
    """Pixels of the image."""

    @property
    def dice(self) -> float:
        """Kaggle's score of an image, 0 to 1: ``2 |X∩Y| / (|X| + |Y|)``, and 1 where both masks are empty."""
        return _ratio(2 * self.intersection, self.predicted + self.true)

    @property
    def iou(self) -> float:
        """Intersection over union, 0 to 1, and 1 where both masks are empty."""
        return _ratio(self.intersection, self.predicted + self.true - self.intersection)

    @property
    def accuracy(self) -> float:
        """Share of pixels, 0 to 1, on which both masks agree."""
        return _ratio(self.pixels - self.predicted - self.true + 2 * self.intersection, self.pixels)


def confusion_counts(predicted_HW: MaskLike, true_HW: MaskLike) -> ConfusionCounts:
    """Return the counts of a predicted and a true mask.

    Raises ValueError if their shapes differ: masks are scored at the image's own size, and never broadcast.
    """
    if predicted_HW.shape != true_HW.shape:
        raise ValueError(f"The predicted mask has the shape {predicted_HW.shape}, the true one {true_HW.shape}.")
    return ConfusionCounts(
        intersection=int(np.count_nonzero(np.logical_and(predicted_HW, true_HW))),
        predicted=int(np.count_nonzero(predicted_HW)),
        true=int(np.count_nonzero(true_HW)),
        pixels=predicted_HW.size,
    )


def confusion_counts_from_runs(
    predicted_N2: NDArray[np.int64], true_M2: NDArray[np.int64], pixels: int
) -> ConfusionCounts:
    """Return the counts of two masks of so many pixels from their runs, without painting them.

    Runs are as `pipeline.competition.rle` defines them, and valid.
    """
    return ConfusionCounts(
        intersection=intersection_of_runs(predicted_N2, true_M2),
        predicted=int(predicted_N2[:, 1].sum()),
        true=int(true_M2[:, 1].sum()),
        pixels=pixels,
    )


def intersection_of_runs(runs_N2: NDArray[np.int64], others_M2: NDArray[np.int64]) -> int:
    """Return the number of pixels that two lists of valid runs share."""
    starts, lengths = runs_N2.T
    shared_N = _covered_before(starts + lengths, others_M2) - _covered_before(starts, others_M2)
    return int(shared_N.sum())


def _covered_before(pixels_K: NDArray[np.int64], runs_N2: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each pixel how many pixels before it the runs cover."""
    starts, lengths = runs_N2.T
    begun_K = np.searchsorted(starts, pixels_K)  # how many runs begin before the pixel
    stops = np.concatenate([[0], starts + lengths])
    covered = np.concatenate([[0], np.cumsum(lengths)])
    not_yet_K = np.maximum(stops[begun_K] - pixels_K, 0)  # what the last run begun still has to cover
    return covered[begun_K] - not_yet_K


def _ratio(part: int, whole: int) -> float:
    """Return ``part / whole``, and 1 where there is nothing to get wrong."""
    return part / whole if whole else 1.0
