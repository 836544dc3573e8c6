"""What an ablation concludes, and what it leaves open."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from pipeline.ablation.search_space import EnsembleConfig
from pipeline.ablation.statistics import ABLATION_COLUMNS, AblationStatistics
from tests.fakes.fake_ablation import VIEWS, trial_of


def folds_setting(count: int, views: Sequence[str] = ("identity",), threshold: float = 0.5) -> EnsembleConfig:
    return EnsembleConfig(("net",), tuple(range(count)), tuple(views), "mean_probability", (1,), threshold)


SECONDS = {(("net", fold), view): 0.1 for fold in range(5) for view in VIEWS}


class TestAblationStatistics:
    settings = (folds_setting(3), folds_setting(1), folds_setting(5), folds_setting(5, VIEWS), folds_setting(2))

    def statistics(self, cars: int = 10) -> AblationStatistics:
        """Now 0.99; one fold loses, five gain, more views and two folds change next to nothing."""
        random = np.random.default_rng(3)
        base_C = 0.99 + random.normal(0, 0.003, cars)
        noise_SC = random.normal(0, 0.00005, (5, cars))
        gains_S1 = np.array([[0.0], [-0.001], [0.0005], [0.00052], [0.0]])
        return AblationStatistics("holdout", trial_of(base_C + gains_S1 + noise_SC, self.settings), SECONDS)

    def test_ablation_table_columns(self) -> None:
        table = self.statistics().table
        assert tuple(table.columns) == ABLATION_COLUMNS
        assert table["current"].tolist() == [True, False, False, False, False]
        assert table["passes"].tolist() == [3, 1, 5, 15, 2]
        assert table["seconds"].tolist() == pytest.approx([0.3, 0.1, 0.5, 1.5, 0.2])
        assert table["disk_bytes"].tolist() == [3000, 1000, 5000, 15000, 2000]
        assert (table["difference"] == table["dice"] - table["dice"][0]).all()
        assert table["low"].isna().tolist() == [True, False, False, False, False]
        assert ((table["low"] <= table["difference"]) & (table["difference"] <= table["high"]))[1:].all()
        assert (table["low"][2:4] > 0).all()
        assert table["high"][1] < 0
        assert table.loc[1, "worse"] == 160
        assert table.loc[2, "better"] == 160
        assert table["kind"].tolist() == ["folds", "single net", "folds", "folds", "folds"]

    def test_paired_intervals_are_far_narrower_than_those_of_means(self) -> None:
        statistics = self.statistics()
        current = statistics.summary()["current"]
        row = statistics.table.iloc[2]
        assert current["high"] - current["low"] > 10 * (row["high"] - row["low"])

    def test_cheapest_setting_in_the_confidence_set(self) -> None:
        summary = self.statistics().summary()
        assert summary["best"]["passes"] == 15
        assert summary["confidence_set_size"] == 2
        assert summary["cheapest"]["passes"] == 5

    def test_pareto_front(self) -> None:
        table = self.statistics().table
        assert table["front"][[1, 2, 3]].all()
        dominated = table[~table["front"]]
        for row in dominated.itertuples():
            assert ((table["dice"] >= row.dice) & (table["seconds"] <= row.seconds)).sum() > 1

    def test_without_seconds_passes_count(self) -> None:
        statistics = replace(self.statistics(), seconds={})
        assert statistics.table["seconds"].isna().all()
        assert statistics.summary()["cheapest"]["passes"] == 5

    @pytest.mark.parametrize("cars", [1, 7])
    def test_few_cars_have_no_intervals_and_it_says_why(self, cars: int) -> None:
        summary = self.statistics(cars).summary()
        assert f"{cars} car" in summary["no_interval"]
        assert summary["current"]["low"] is None
        assert summary["confidence_set_size"] is None
        assert summary["cheapest"] is None
        assert summary["best"]["low"] is None
        assert summary["recommended"] is None
        assert (summary["nested_selection"] is None) == (cars == 1)

    @pytest.mark.slow
    def test_the_best_of_random_settings_is_biased_upward(self) -> None:
        random = np.random.default_rng(0)
        settings = [folds_setting(1, threshold=0.3 + n / 1000) for n in range(300)]
        best, nested = [], []
        for _ in range(20):
            statistics = AblationStatistics(
                "holdout", trial_of(0.99 + random.normal(0, 0.001, (300, 12)), settings), SECONDS
            )
            selection = statistics.summary()["nested_selection"]
            best.append(selection["best_dice"] - 0.99)
            nested.append(selection["nested_dice"] - 0.99)
        assert np.mean(best) > 0.0005  # of 300 equal settings the luckiest
        assert abs(np.mean(nested)) < 0.0002

    def test_choosing_a_setting_that_is_better_is_not_biased(self) -> None:
        selection = self.statistics().summary()["nested_selection"]
        assert selection["nested_dice"] == pytest.approx(selection["best_dice"], abs=5e-5)
        assert selection["difference"] > 0.0003
        assert selection["groups"] == 10
