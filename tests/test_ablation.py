"""Ablation: equal to brute force to the last pixel, honest about what it can't tell, and quick to say what is wrong."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from pipeline.ablation import fast_dice
from pipeline.ablation.fast_dice import MapStack, SettingScorer
from pipeline.ablation.runner import AblationRunner, ScoringGroup, score_settings
from pipeline.ablation.search_space import OWN_FOLD, AblationSpace, EnsembleConfig
from pipeline.ablation.statistics import ABLATION_COLUMNS, AblationScores, AblationStatistics
from pipeline.competition.dice import ConfusionCounts, confusion_counts
from pipeline.competition.image_ids import HEIGHT, WIDTH, format_image_id
from pipeline.config import AblationSettings, EnsembleSettings, NetId, ScoredSplit
from pipeline.ensemble.postprocess import MaskBuilder
from pipeline.errors import CarvanaError
from pipeline.inference.prediction_store import (
    TIMING_FILE,
    PredictionStore,
    ShardWriter,
    Timing,
    shard_name,
    write_index,
    write_timing,
)
from pipeline.inference.probability_map import ProbabilityMap, sum_maps

VIEWS = ("identity", "hflip", "scale:0.75")
MODELS = ("small", "large")
FOLDS = (0, 1, 2)
NETS = list(product(MODELS, FOLDS))
SIZE = (60, 90)

Maps = dict[tuple[NetId, str], ProbabilityMap]


def drawn(seed: int, nets: Sequence[NetId] = NETS, views: Sequence[str] = VIEWS) -> tuple[Maps, NDArray[np.uint8]]:
    """Maps and the true mask of an image on which nets agree in most places, as trained ones do."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    distance = np.hypot(y - 30, x - 45) - random.uniform(5, 40)
    true_HW = (distance + random.normal(0, 1, distance.shape) < 0).astype(np.uint8)
    maps: Maps = {}
    for net, view in product(nets, views):
        soft = 1 / (1 + np.exp(distance / 2 + random.normal(0, 0.7) + random.normal(0, 0.3, distance.shape)))
        levels = np.rint(np.clip((soft - 0.02) / 0.96, 0, 1) * 255).astype(np.uint8)
        levels[random.random(levels.shape) < 0.02] = random.choice([0, 102, 127, 128, 255])
        maps[net, view] = ProbabilityMap.crop("0123456789ab_01", view, 1, levels)
    return maps, true_HW


def brute_force(setting: EnsembleConfig, maps: Maps, true_HW: NDArray[np.uint8]) -> ConfusionCounts:
    summed = [sum_maps([maps[net, view] for view in setting.views]) for net in setting.nets]
    return confusion_counts(setting.merge_rule.mask(summed, *true_HW.shape), true_HW)


def choices(**changes: Any) -> AblationSpace:
    known: dict[str, Any] = {
        "ablation": AblationSettings(weights=({}, {"small": 3}), threshold=(0.0005, 0.3, 0.4, 0.5, 0.999)),
        "ensemble": EnsembleSettings(),
        "models": MODELS,
        "folds": FOLDS,
        "predicted": {"oof": VIEWS, "holdout": VIEWS},
        "views": ("identity", "hflip"),
    }
    return AblationSpace(**(known | changes))


class TestCounting:
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
    def test_as_few_pixels_are_looked_at_as_the_thresholds_allow(self, thresholds: tuple[float, ...]) -> None:
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


class TestSuspicion:
    def test_is_the_largest_region_where_all_are_certain_and_the_label_says_otherwise(self) -> None:
        true_HW = np.zeros(SIZE, np.uint8)
        true_HW[10:30, 10:30] = 1
        sure = true_HW * np.uint8(255)
        sure[40:45, 50:60] = 255  # 50 pixels that the label lacks
        sure[10:14, 10:14] = 0  # 16 that it has too much
        other = sure.copy()
        other[44] = 128  # one net is not certain of 10 of them
        stack = MapStack.of([[ProbabilityMap.crop("a", "identity", 1, levels)] for levels in (sure, other)], true_HW)
        assert stack.label_conflict().__dict__ == {"pixels": 40, "top": 40, "left": 50, "height": 4, "width": 10}

    def test_of_car_that_no_net_sees(self) -> None:
        true_HW = np.zeros(SIZE, np.uint8)
        true_HW[20:30, 40:60] = 1
        nothing = ProbabilityMap.crop("a", "identity", 1, np.zeros(SIZE, np.uint8))
        suspicion = MapStack.of([[nothing]], true_HW).label_conflict()
        assert (suspicion.pixels, suspicion.top, suspicion.left) == (200, 20, 40)


class TestGrid:
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

    @pytest.mark.parametrize(("cars", "words"), [(0, "No cars are held out"), (1, "One car is held out")])
    def test_fold_ensembles_are_refused_without_held_out_cars(self, cars: int, words: str) -> None:
        assert choices().why_not_scorable("oof", cars) is None
        assert choices().why_not_scorable("holdout", 2) is None
        refusal = choices().why_not_scorable("holdout", cars)
        assert refusal is not None
        assert words in refusal
        assert "set folds.holdout_cars" in refusal
        with pytest.raises(CarvanaError, match=words):
            choices(ablation=AblationSettings(folds=((0, 1),))).why_not_scorable("holdout", cars)


def trial_of(dice_SC: NDArray[np.float64], settings: Sequence[EnsembleConfig]) -> AblationScores:
    """Every car has 16 images of the same Dice."""
    cars = dice_SC.shape[1]
    images = pd.DataFrame(
        [
            (format_image_id(f"{car:012x}", angle), f"{car:012x}", angle)
            for car in range(cars)
            for angle in range(1, 17)
        ],
        columns=["image_id", "car", "angle"],
    )
    sizes = {(net, view): 1000.0 for setting in settings for net in setting.nets for view in setting.views}
    return AblationScores(settings, images, np.repeat(dice_SC, 16, axis=1), sizes)


def folds_setting(count: int, views: Sequence[str] = ("identity",), threshold: float = 0.5) -> EnsembleConfig:
    return EnsembleConfig(("net",), tuple(range(count)), tuple(views), "mean_probability", (1,), threshold)


SECONDS = {(("net", fold), view): 0.1 for fold in range(5) for view in VIEWS}


class TestVerdict:
    settings = (folds_setting(3), folds_setting(1), folds_setting(5), folds_setting(5, VIEWS), folds_setting(2))

    def verdict(self, cars: int = 10) -> AblationStatistics:
        """Now 0.99; one fold loses, five gain, more views and two folds change next to nothing."""
        random = np.random.default_rng(3)
        base_C = 0.99 + random.normal(0, 0.003, cars)
        noise_SC = random.normal(0, 0.00005, (5, cars))
        gains_S1 = np.array([[0.0], [-0.001], [0.0005], [0.00052], [0.0]])
        return AblationStatistics("holdout", trial_of(base_C + gains_S1 + noise_SC, self.settings), SECONDS)

    def test_the_table(self) -> None:
        table = self.verdict().table
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
        verdict = self.verdict()
        current = verdict.summary()["current"]
        row = verdict.table.iloc[2]
        assert current["high"] - current["low"] > 10 * (row["high"] - row["low"])

    def test_the_cheapest_that_is_as_good_as_the_best(self) -> None:
        summary = self.verdict().summary()
        assert summary["best"]["passes"] == 15
        assert summary["indistinguishable"] == 2
        assert summary["cheapest"]["passes"] == 5

    def test_the_front(self) -> None:
        table = self.verdict().table
        assert table["front"][[1, 2, 3]].all()
        dominated = table[~table["front"]]
        for row in dominated.itertuples():
            assert ((table["dice"] >= row.dice) & (table["seconds"] <= row.seconds)).sum() > 1

    def test_without_seconds_passes_count(self) -> None:
        verdict = replace(self.verdict(), seconds={})
        assert verdict.table["seconds"].isna().all()
        assert verdict.summary()["cheapest"]["passes"] == 5

    @pytest.mark.parametrize("cars", [1, 7])
    def test_few_cars_have_no_intervals_and_it_says_why(self, cars: int) -> None:
        summary = self.verdict(cars).summary()
        assert f"{cars} car" in summary["no_interval"]
        assert summary["current"]["low"] is None
        assert summary["indistinguishable"] is None
        assert summary["cheapest"] is None
        assert summary["best"]["low"] is None
        assert summary["advice"] is None
        assert (summary["selection"] is None) == (cars == 1)

    def test_chosen_from_noise_the_best_looks_better_than_it_is(self) -> None:
        random = np.random.default_rng(0)
        settings = [folds_setting(1, threshold=0.3 + n / 1000) for n in range(300)]
        optimistic, honest = [], []
        for _ in range(20):
            verdict = AblationStatistics(
                "holdout", trial_of(0.99 + random.normal(0, 0.001, (300, 12)), settings), SECONDS
            )
            selection = verdict.summary()["selection"]
            optimistic.append(selection["optimistic"] - 0.99)
            honest.append(selection["honest"] - 0.99)
        assert np.mean(optimistic) > 0.0005  # of 300 equal settings the luckiest
        assert abs(np.mean(honest)) < 0.0002

    def test_choosing_a_setting_that_is_better_is_honest_too(self) -> None:
        selection = self.verdict().summary()["selection"]
        assert selection["honest"] == pytest.approx(selection["optimistic"], abs=5e-5)
        assert selection["difference"] > 0.0003
        assert selection["groups"] == 10


CARS = [f"{number:012x}" for number in range(3)]
HELD_OUT = [f"{number:012x}" for number in (10, 11)]


class Stored:
    """Maps of two models and three folds on disk, of one image a validation car and of two a held-out one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.masks: dict[str, NDArray[np.uint8]] = {}
        self.maps: dict[str, Maps] = {}
        self.oof = {fold: [format_image_id(car, 1)] for fold, car in enumerate(CARS)}
        self.held_out = [format_image_id(car, angle) for car in HELD_OUT for angle in (1, 2)]
        for number, image_id in enumerate([*(ids[0] for ids in self.oof.values()), *self.held_out]):
            small, true_HW = drawn(number)
            self.masks[image_id] = np.zeros((HEIGHT, WIDTH), np.uint8)
            self.masks[image_id][600 : 600 + SIZE[0], 900 : 900 + SIZE[1]] = true_HW
            self.maps[image_id] = {
                key: replace(m, image_id=image_id, top=m.top + 600, left=m.left + 900) for key, m in small.items()
            }
        for model, fold in NETS:
            self.write("oof", (model, fold), self.oof[fold])
            self.write("holdout", (model, fold), self.held_out)

    def write(self, split: str, net: NetId, image_ids: Sequence[str], views: Sequence[str] = VIEWS) -> None:
        folder = self.where(split, net)
        folder.mkdir(parents=True, exist_ok=True)
        with ShardWriter(folder / shard_name(0)) as writer:
            for image_id in image_ids:
                for view in views:
                    writer.add(self.maps[image_id][net, view])
            writer.note_unreadable({})
        write_index(
            folder, image_ids, views, merged=False, shard_images=8, unreadable={}, digests=[], net=f"{net[0]}{net[1]}"
        )
        write_timing(folder / TIMING_FILE, Timing(4, 2.0, dict.fromkeys(views, 1.0), "here"))

    def where(self, split: str, net: NetId) -> Path:
        return self.folder / split / net[0] / str(net[1])

    def panels(self, split: ScoredSplit) -> list[ScoringGroup]:
        if split == "holdout":
            return [ScoringGroup(NETS, [PredictionStore(self.where(split, net)) for net in NETS])]
        return [
            ScoringGroup(
                [(m, OWN_FOLD) for m in MODELS], [PredictionStore(self.where(split, (m, fold))) for m in MODELS]
            )
            for fold in FOLDS
        ]

    def comparison(self, **changes: Any) -> AblationRunner:
        return AblationRunner(choices(**changes), len(HELD_OUT), self.panels, self.masks.__getitem__, self.photo)

    def photo(self, image_id: str) -> NDArray[np.uint8]:
        return np.repeat(self.masks[image_id][..., None] * np.uint8(200), 3, axis=2)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return Stored(tmp_path_factory.mktemp("stored"))


class TestComparison:
    def test_what_is_read_from_disk_equals_brute_force(self, stored: Stored) -> None:
        for split in ("oof", "holdout"):
            grid = choices().grid(split)[::17]
            trial = score_settings(stored.panels(split), grid, VIEWS, stored.masks.__getitem__, "")
            for image, image_id in enumerate(trial.images["image_id"]):
                for index, setting in enumerate(grid):
                    own = [(m, CARS.index(image_id[:12])) if f == OWN_FOLD else (m, f) for m, f in setting.nets]
                    maps = [sum_maps([stored.maps[image_id][net, view] for view in setting.views]) for net in own]
                    expected = confusion_counts(setting.merge_rule.mask(maps), stored.masks[image_id])
                    assert trial.dice_SI[index, image] == expected.dice

    def test_tables(self, stored: Stored) -> None:
        findings = stored.comparison().run()
        table = pd.concat(findings.settings, ignore_index=True)
        assert table.groupby("split").size().to_dict() == {s: len(choices().grid(s)) for s in ("oof", "holdout")}
        assert table["current"].sum() == 2
        current = table[table["current"]].set_index("split")
        assert current["seconds"].to_dict() == pytest.approx({"oof": 2 * 2 / 6, "holdout": 6 * 2 / 6})
        assert (table["disk_bytes"] > 0).all()
        assert findings.fold_worth["count"].value_counts().to_dict() == {1: 9, 2: 9, 3: 3}
        worth = findings.fold_worth.set_index(["models", "folds"])["dice"]
        assert worth["small large", "0 1 2"] == pytest.approx(current.loc["holdout", "dice"])
        doubts = pd.concat(findings.doubts, ignore_index=True)
        assert doubts.groupby("split")["image_id"].apply(list).to_dict() == {
            "oof": [ids[0] for ids in stored.oof.values()],
            "holdout": stored.held_out,
        }
        assert doubts["nets"].tolist() == [2, 2, 2, 6, 6, 6, 6]
        assert (doubts["disagreement"] > 0).all()

    def test_steps_after_the_merge(self, stored: Stored) -> None:
        steps = ((), ("refine_edges",), ("keep_largest", "fill_holes"))
        ablation = AblationSettings(postprocess=steps, postprocess_best=1, threshold=(0.4, 0.5))
        findings = stored.comparison(ablation=ablation).run()
        table = pd.concat(findings.postprocess, ignore_index=True)
        holdout = table[table["split"] == "holdout"]
        assert holdout["postprocess"].tolist() == ["none", "refine_edges", "keep_largest fill_holes"] * 2
        grid = pd.concat(findings.settings).query("split == 'holdout'")
        assert holdout["dice"].iloc[0] == pytest.approx(grid["dice"].iloc[0])
        assert holdout["dice"].iloc[3] == pytest.approx(grid["dice"].max())
        for number, step in enumerate(steps):
            decision = MaskBuilder(choices().current("holdout").merge_rule, step, stored.photo)
            dice = [
                confusion_counts(
                    decision.mask([sum_maps([stored.maps[i][net, view] for view in VIEWS[:2]]) for net in NETS]),
                    stored.masks[i],
                ).dice
                for i in stored.held_out
            ]
            assert holdout["dice"].iloc[number] == pytest.approx(np.mean(dice))
        assert holdout["dice"].nunique() > 3

    def test_the_steps_of_the_submission_are_what_others_are_held_against(self, stored: Stored) -> None:
        ensemble = EnsembleSettings(postprocess=("keep_largest",))
        table = pd.concat(stored.comparison(ensemble=ensemble).run().postprocess).query("split == 'oof'")
        assert table["postprocess"].tolist()[:4] == ["keep_largest", "none", "fill_holes", "refine_edges"]
        assert table["current"].tolist() == [True] + [False] * (len(table) - 1)
        assert table["difference"].iloc[0] == 0

    def test_no_steps(self, stored: Stored) -> None:
        findings = stored.comparison(ablation=AblationSettings(postprocess=(), threshold=(0.5,))).run()
        assert pd.concat(findings.postprocess).empty

    def test_without_held_out_cars_folds_are_not_scored(self, stored: Stored) -> None:
        findings = replace(stored.comparison(), held_out=0).run()
        assert "set folds.holdout_cars" in findings.facts["holdout"]["refused"]
        assert findings.facts["oof"]["settings"] == len(choices().grid("oof"))
        assert set(pd.concat(findings.settings)["split"]) == {"oof"}
        assert findings.fold_worth.empty

    @pytest.mark.parametrize(
        ("images", "views", "digest", "words"),
        [
            (slice(1), VIEWS, "small0", "other images"),
            (slice(None), VIEWS, "retrained", "an earlier net"),
            (slice(None), (*VIEWS, "scale:2"), "small0", "lacks the view scale:2"),
            (slice(None), VIEWS[:2], "small0", "other views"),
        ],
    )
    def test_stale_maps(self, stored: Stored, images: slice, views: Sequence[str], digest: str, words: str) -> None:
        panel = ScoringGroup([("small", 0)], [PredictionStore(stored.where("holdout", ("small", 0)))])
        with pytest.raises(CarvanaError, match=words) as caught:
            panel.validate(stored.held_out[images], views, [digest])
        assert "holdout/small/0" in str(caught.value)
        assert "'dvc repro' makes its maps again" in str(caught.value)
        panel.validate(stored.held_out, VIEWS, ["small0"])

    def test_missing_maps(self, stored: Stored) -> None:
        with pytest.raises(CarvanaError, match=r"holds no maps .*'dvc repro'"):
            PredictionStore(stored.folder / "holdout/small/9")
