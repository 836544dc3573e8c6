"""Fast Dice: equal to brute force to the last pixel."""

from itertools import product

import numpy as np
import pytest

from pipeline.ablation import fast_dice
from pipeline.ablation.fast_dice import MapStack, SettingScorer
from pipeline.config import AblationSettings, EnsembleSettings
from pipeline.inference.probability_map import ProbabilityMap
from tests.fakes.fake_ablation import NETS, SIZE, VIEWS, Maps, brute_force, choices, drawn


class TestSettingScorer:
    @pytest.mark.parametrize("seed", range(8))
    def test_every_setting_equals_brute_force_to_the_pixel(self, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fast_dice, "_PIXELS_AT_ONCE", [50, 333, 1 << 15][seed % 3])
        maps, true_HW = drawn(seed)
        grid = [*choices().grid("holdout"), *choices().fold_subsets()]
        stack = MapStack.of([[maps[net, view] for view in VIEWS] for net in NETS], true_HW)
        counter = SettingScorer(grid, NETS, VIEWS)
        pixels = stack.ambiguous_pixels(counter.bounds)
        counted, dice = counter.count(pixels), counter.dice(pixels)
        for setting, (both, own), score in zip(grid, counted.tolist(), dice.tolist(), strict=True):
            expected = brute_force(setting, maps, true_HW)
            assert (both, own, pixels.total_true) == expected[:3], setting
            assert score == expected.dice
        assert len({tuple(pair) for pair in counted.tolist()}) > len(grid) / 10

    @pytest.mark.parametrize("level", [0, 255])
    def test_an_image_without_an_undecided_pixel(self, level: int) -> None:
        whole = np.full(SIZE, level, np.uint8)
        maps: Maps = {key: ProbabilityMap.crop("a", key[1], 1, whole) for key in product(NETS, VIEWS)}
        for true_HW in (np.zeros(SIZE, np.uint8), np.ones(SIZE, np.uint8)):
            stack = MapStack.of([[maps[net, view] for view in VIEWS] for net in NETS], true_HW)
            grid = choices().grid("holdout")
            expected = brute_force(grid[0], maps, true_HW)
            counter = SettingScorer(grid, NETS, VIEWS)
            assert (counter.dice(stack.ambiguous_pixels(counter.bounds)) == expected.dice).all()
            assert stack.label_conflict().pixels == (whole.size if (level == 255) != true_HW.any() else 0)

    @pytest.mark.parametrize("thresholds", [(0.5,), (0.3, 0.7), (0.0005, 0.999), (0.4,), (0.5, 0.2)])
    def test_ambiguous_pixels_are_minimal_for_the_thresholds(self, thresholds: tuple[float, ...]) -> None:
        maps, true_HW = drawn(1)
        stack = MapStack.of([[maps[net, view] for view in VIEWS] for net in NETS], true_HW)
        grid = choices(
            ablation=AblationSettings(threshold=thresholds), ensemble=EnsembleSettings(threshold=thresholds[0])
        ).grid("holdout")
        counter = SettingScorer(grid, NETS, VIEWS)
        pixels = stack.ambiguous_pixels(counter.bounds)
        for setting, (both, own) in zip(grid, counter.count(pixels).tolist(), strict=True):
            assert (both, own, pixels.total_true) == brute_force(setting, maps, true_HW)[:3], setting
        rasters = np.stack([level_map.to_full_size(*SIZE) for level_map in maps.values()])
        low, high = (np.ceil(np.round(255 * t, 9)) for t in (min(thresholds), max(thresholds)))
        sure = (rasters <= max(0, low - 2)).all(axis=0) | (rasters >= high).all(axis=0)
        assert pixels.probs_u8_NVU.shape == (len(NETS), len(VIEWS), true_HW.size - np.count_nonzero(sure))


class TestLabelConflict:
    def test_label_conflict_is_the_largest_region_of_certain_disagreement(self) -> None:
        true_HW = np.zeros(SIZE, np.uint8)
        true_HW[10:30, 10:30] = 1
        sure = true_HW * np.uint8(255)
        sure[40:45, 50:60] = 255  # 50 pixels that the label lacks
        sure[10:14, 10:14] = 0  # 16 that it has too much
        other = sure.copy()
        other[44] = 128  # one net is not certain of 10 of them
        stack = MapStack.of([[ProbabilityMap.crop("a", "identity", 1, levels)] for levels in (sure, other)], true_HW)
        assert stack.label_conflict().__dict__ == {"pixels": 40, "top": 40, "left": 50, "height": 4, "width": 10}

    def test_label_conflict_of_a_missed_car(self) -> None:
        true_HW = np.zeros(SIZE, np.uint8)
        true_HW[20:30, 40:60] = 1
        nothing = ProbabilityMap.crop("a", "identity", 1, np.zeros(SIZE, np.uint8))
        suspicion = MapStack.of([[nothing]], true_HW).label_conflict()
        assert (suspicion.pixels, suspicion.top, suspicion.left) == (200, 20, 40)
