"""Scores of a predicted mask against the true one: Dice as Kaggle computes it, IoU, pixel accuracy."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.competition.rle import MaskLike


class ConfusionCounts(NamedTuple):
    """Pixel counts of one image, from which every score is computed."""

    intersection: int
    """Foreground pixels in both masks."""
    predicted: int
    """Foreground pixels in the predicted mask."""
    true: int
    """Foreground pixels in the true mask."""
    pixels: int
    """All pixels of the image."""

    @property
    def dice(self) -> float:
        """Dice coefficient, 0 to 1: ``2 |X∩Y| / (|X| + |Y|)``, and 1 if both masks are empty, as Kaggle scores it."""
        return _ratio(2 * self.intersection, self.predicted + self.true)

    @property
    def iou(self) -> float:
        """Intersection over union, 0 to 1, and 1 if both masks are empty."""
        return _ratio(self.intersection, self.predicted + self.true - self.intersection)

    @property
    def accuracy(self) -> float:
        """Pixel accuracy, 0 to 1: the share of pixels on which both masks agree."""
        return _ratio(self.pixels - self.predicted - self.true + 2 * self.intersection, self.pixels)


def confusion_counts(predicted_HW: MaskLike, true_HW: MaskLike) -> ConfusionCounts:
    """Return the pixel counts of a predicted and a true mask, bool or integer (H, W); nonzero is foreground.

    Raises ValueError if the shapes differ; masks are not broadcast.
    """
    if predicted_HW.shape != true_HW.shape:
        raise ValueError(f"The predicted mask has shape {predicted_HW.shape}, the true mask {true_HW.shape}.")
    return ConfusionCounts(
        intersection=int(np.count_nonzero(np.logical_and(predicted_HW, true_HW))),
        predicted=int(np.count_nonzero(predicted_HW)),
        true=int(np.count_nonzero(true_HW)),
        pixels=predicted_HW.size,
    )


def confusion_counts_from_runs(
    predicted_N2: NDArray[np.int64], true_M2: NDArray[np.int64], pixels: int
) -> ConfusionCounts:
    """Return the pixel counts of two masks of ``pixels`` pixels each from their runs, without decoding them.

    The runs must be valid (see ``pipeline.competition.rle``).
    """
    return ConfusionCounts(
        intersection=intersection_of_runs(predicted_N2, true_M2),
        predicted=int(predicted_N2[:, 1].sum()),
        true=int(true_M2[:, 1].sum()),
        pixels=pixels,
    )


def intersection_of_runs(runs_N2: NDArray[np.int64], others_M2: NDArray[np.int64]) -> int:
    """Return the number of pixels that both lists of valid runs cover."""
    starts, lengths = runs_N2.T
    shared_N = _covered_before(starts + lengths, others_M2) - _covered_before(starts, others_M2)
    return int(shared_N.sum())


def _covered_before(pixels_K: NDArray[np.int64], runs_N2: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return, for each pixel index, the number of pixels before it that the runs cover."""
    starts, lengths = runs_N2.T
    runs_before_K = np.searchsorted(starts, pixels_K)  # number of runs that start before the pixel
    stops = np.concatenate([[0], starts + lengths])
    covered = np.concatenate([[0], np.cumsum(lengths)])
    remainder_K = np.maximum(stops[runs_before_K] - pixels_K, 0)  # part of the last of these runs after the pixel
    return covered[runs_before_K] - remainder_K


def _ratio(part: int, total: int) -> float:
    """Return ``part / total``, or 1 if ``total`` is 0."""
    return part / total if total else 1.0
