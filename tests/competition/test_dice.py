import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from pipeline.competition import rle
from pipeline.competition.dice import (
    ConfusionCounts,
    confusion_counts,
    confusion_counts_from_runs,
    intersection_of_runs,
)

PAIRS = array_shapes(min_dims=2, max_dims=2, max_side=16).flatmap(
    lambda shape: st.tuples(*[arrays(np.uint8, shape, elements=st.integers(0, 1))] * 2)
)


def test_scores_by_hand():
    predicted = np.array([[1, 1, 1, 0, 0]], dtype=np.uint8)
    true = np.array([[0, 1, 1, 1, 1]], dtype=np.uint8)
    counts = confusion_counts(predicted, true)
    assert counts == ConfusionCounts(intersection=2, predicted=3, true=4, pixels=5)
    assert counts.dice == 4 / 7
    assert counts.iou == 2 / 5
    assert counts.accuracy == 2 / 5


def test_two_empty_masks_agree():
    empty = np.zeros((2, 3), dtype=np.uint8)
    counts = confusion_counts(empty, empty)
    assert (counts.dice, counts.iou, counts.accuracy) == (1.0, 1.0, 1.0)


def test_one_empty_mask_scores_nothing():
    counts = confusion_counts(np.zeros((2, 3), dtype=np.uint8), np.eye(2, 3, dtype=np.uint8))
    assert (counts.dice, counts.iou) == (0.0, 0.0)
    assert counts.accuracy == 4 / 6


@given(PAIRS)
def test_scores_follow_their_definitions(pair):
    predicted, true = (set(np.flatnonzero(mask_HW).tolist()) for mask_HW in pair)
    counts = confusion_counts(*pair)
    both, either = predicted & true, predicted | true
    assert counts.dice == (2 * len(both) / (len(predicted) + len(true)) if either else 1)
    assert counts.iou == (len(both) / len(either) if either else 1)
    assert counts.accuracy == np.mean(pair[0] == pair[1])


@given(PAIRS)
def test_any_mask_type_counts_alike(pair):
    predicted, true = pair
    assert confusion_counts(predicted.astype(bool), true * np.uint8(255)) == confusion_counts(predicted, true)
    assert confusion_counts(predicted * np.uint8(2), true) == confusion_counts(predicted, true)  # not a bitwise and


@given(PAIRS)
def test_runs_count_as_pixels_do(pair):
    runs = [rle.mask_to_runs(mask_HW) for mask_HW in pair]
    assert confusion_counts_from_runs(*runs, pixels=pair[0].size) == confusion_counts(*pair)


@given(PAIRS, st.data())
def test_touching_runs_overlap_as_one(pair, data):
    predicted, true = (rle.mask_to_runs(mask_HW) for mask_HW in pair)
    split = data.draw(st.lists(st.booleans(), min_size=len(predicted), max_size=len(predicted)))
    pieces = []
    for (start, length), cut in zip(predicted.tolist(), split, strict=True):
        first = length // 2 if cut else 0
        pieces += [(start, first)] * (first > 0) + [(start + first, length - first)]
    touching = np.array(pieces, dtype=np.int64).reshape(-1, 2)
    assert (
        intersection_of_runs(touching, true)
        == intersection_of_runs(true, touching)
        == confusion_counts(*pair).intersection
    )


def test_masks_of_other_shapes_are_never_broadcast():
    with pytest.raises(ValueError, match="shape"):
        confusion_counts(np.zeros((2, 3), dtype=np.uint8), np.zeros((1, 3), dtype=np.uint8))
