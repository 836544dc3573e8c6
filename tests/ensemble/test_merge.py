"""Merging maps: equal to exact fractions; ties are foreground."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.ensemble.merge import MergeRule
from pipeline.inference.probability_map import ProbabilityMap, sum_views
from tests.fakes.fake_maps import FULL, levels


def brute_force(name: str, threshold: str, rasters: list[NDArray[np.int64]], counts: list[int], weights: list[int]):
    """Merge in exact fractions, a pixel at a time, from the definitions."""
    limit, total = Fraction(threshold), sum(weights)
    out = np.zeros(rasters[0].shape, np.bool_)
    for index in np.ndindex(out.shape):
        parts = [Fraction(int(r[index]), FULL * n) for r, n in zip(rasters, counts, strict=True)]
        if name == "mean_probability":
            out[index] = sum(w * p for w, p in zip(weights, parts, strict=True)) >= limit * total
        else:
            out[index] = 2 * sum(w for w, p in zip(weights, parts, strict=True) if p >= limit) >= total
    return out


class TestMerge:
    @settings(deadline=None, max_examples=40)
    @given(
        name=st.sampled_from(["mean_probability", "majority_vote"]),
        threshold=st.sampled_from(["0.5", "0.3", "0.45", "0.999", "0.001"]),
        nets=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=4),
        seed=st.integers(0, 1000),
    )
    def test_equals_exact_fractions(self, name: str, threshold: str, nets: list[tuple[int, int]], seed: int) -> None:
        counts, weights = [n for n, _ in nets], [w for _, w in nets]
        views = [levels(seed + k, 12, 15, n) for k, n in enumerate(counts)]
        maps = [sum_views("a", "v", raster) for raster in views]
        merge = MergeRule(name, float(threshold), tuple(counts), tuple(weights))
        rasters = [raster.sum(axis=0, dtype=np.int64) for raster in views]
        assert np.array_equal(merge.mask(maps, 12, 15), brute_force(name, threshold, rasters, counts, weights))

    def test_mean_logit_equals_the_float_mean_except_at_ties(self) -> None:
        views = [levels(seed, views=1) for seed in range(3)]
        maps = [sum_views("a", "v", raster) for raster in views]
        mask = MergeRule("mean_logit", 0.5, (1, 1, 1), (2, 1, 1)).mask(maps, 40, 50)
        clipped = [np.clip(raster[0] / FULL, 0.5 / FULL, 1 - 0.5 / FULL) for raster in views]
        mean = sum(w * np.log(p / (1 - p)) for w, p in zip((2, 1, 1), clipped, strict=True)) / 4
        clear = np.abs(mean) > 1e-3
        assert np.array_equal(mask[clear], mean[clear] >= 0)
        assert clear.mean() > 0.9

    def test_ties_count_as_foreground(self) -> None:
        def maps(*values: int) -> list[ProbabilityMap]:
            return [ProbabilityMap("a", "v", 1, 0, 0, np.array([[value]], np.uint8)) for value in values]

        assert MergeRule("mean_probability", 0.5, (1, 1), (1, 1)).mask(maps(255, 0), 1, 1).item()
        assert not MergeRule("mean_probability", 0.5, (1, 1), (1, 1)).mask(maps(254, 0), 1, 1).item()
        assert MergeRule("majority_vote", 0.5, (1, 1), (1, 1)).mask(maps(128, 0), 1, 1).item()
        assert not MergeRule("majority_vote", 0.5, (1, 1), (1, 1)).mask(maps(127, 0), 1, 1).item()
        assert MergeRule("mean_probability", 0.5, (1,), (1,)).mask(maps(128), 1, 1).item()
        assert not MergeRule("mean_probability", 0.5, (1,), (1,)).mask(maps(127), 1, 1).item()

    @pytest.mark.parametrize("name", ["mean_probability", "mean_logit", "majority_vote"])
    @pytest.mark.parametrize("threshold", [0.0001, 0.5, 0.9999])
    def test_unanimous_certainty_holds_at_any_threshold(self, name: str, threshold: float) -> None:
        raster = np.array([[0, 255]], np.uint8)
        maps = [ProbabilityMap("a", "v", 1, 0, 0, raster)] * 2
        assert MergeRule(name, threshold, (1, 1), (1, 1)).mask(maps, 1, 3).tolist() == [[False, True, False]]

    def test_weights_count(self) -> None:
        maps = [ProbabilityMap("a", "v", 1, 0, 0, np.array([[value]], np.uint8)) for value in (255, 0)]
        assert not MergeRule("mean_probability", 0.5, (1, 1), (1, 2)).mask(maps, 1, 1).item()
        assert MergeRule("mean_probability", 0.5, (1, 1), (2, 1)).mask(maps, 1, 1).item()

    def test_large_sums_do_not_overflow(self) -> None:
        full = ProbabilityMap("a", "v", 257, 0, 0, np.array([[65535]], np.uint16))
        merge = MergeRule("mean_probability", 0.9, (257,) * 3, (1000, 1000, 1000))
        assert merge.mask([full] * 3, 1, 1).item()

    @pytest.mark.parametrize("name", ["mean_probability", "mean_logit", "majority_vote"])
    @pytest.mark.parametrize("weight", [1, 9971, 1_000_000])
    def test_merging_is_monotonic_for_any_weights(self, name: str, weight: int) -> None:
        merge = MergeRule(name, 0.5, (2,) * 10, (weight, weight - weight // 1000) * 5)
        ramp = ProbabilityMap("a", "v", 2, 0, 0, np.arange(511, dtype=np.uint16)[None])
        mask = merge.mask([ramp] * 10, 1, 511)[0]
        assert mask.tolist() == [level >= 255 for level in range(511)]
