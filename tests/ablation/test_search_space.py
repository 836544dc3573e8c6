"""The settings that an ablation compares."""

import pandas as pd
import pytest

from pipeline.config import AblationSettings
from pipeline.errors import CarvanaError
from tests.fakes.fake_ablation import MODELS, VIEWS, choices


class TestAblationSpace:
    def test_the_current_setting_comes_first_and_each_once(self) -> None:
        for split in ("oof", "holdout"):
            grid = choices().grid(split)
            assert grid[0] == choices().current(split)
            assert len(set(grid)) == len(grid)

    def test_one_net_merges_with_nothing(self) -> None:
        grid = choices().grid("oof")
        assert {s.merge for s in grid if len(s.models) == 1} == {"mean_probability"}
        assert {s.merge for s in grid if len(s.models) == 2} == {"mean_probability", "mean_logit", "majority_vote"}
        assert {s.weights for s in grid if len(s.models) == 1} == {(1,)}
        assert {s.weights for s in grid if len(s.models) == 2} == {(1, 1), (3, 1)}

    def test_sets_have_no_order(self) -> None:
        ablation = AblationSettings(views=(("hflip", "identity"), ("identity", "hflip")), models=(("large", "small"),))
        grid = choices(ablation=ablation).grid("oof")
        assert {s.views for s in grid} == {("identity", "hflip")}
        assert {s.models for s in grid} == {MODELS}

    def test_by_default_each_alone_and_the_first_together(self) -> None:
        grid = choices().grid("holdout")
        assert {s.folds for s in grid} == {(0,), (1,), (2,), (0, 1), (0, 1, 2)}
        assert {s.views for s in grid} == {(v,) for v in VIEWS} | {VIEWS[:2], VIEWS}
        assert all(s.folds == () for s in choices().grid("oof"))

    def test_every_subset_of_folds_for_the_ensemble_and_for_each_model(self) -> None:
        subsets = choices().fold_subsets()
        assert len(subsets) == 3 * 7
        assert {s.models for s in subsets} == {MODELS, ("small",), ("large",)}
        many = choices(folds=tuple(range(12))).fold_subsets()
        assert max(pd.Series([len(s.folds) for s in many if len(s.models) == 2]).value_counts()) <= 252

    @pytest.mark.parametrize("cars", [0, 1])
    def test_fold_ensembles_are_not_scored_without_held_out_cars(self, cars: int) -> None:
        assert choices().why_not_scorable("oof", cars) is None
        assert choices().why_not_scorable("holdout", 2) is None
        reason = choices().why_not_scorable("holdout", cars)
        assert reason is not None
        assert "folds.holdout_cars" in reason
        with pytest.raises(CarvanaError, match=r"ablation\.folds"):
            choices(ablation=AblationSettings(folds=((0, 1),))).why_not_scorable("holdout", cars)
