"""The ablation of stored maps: equal to brute force; errors."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from pipeline.ablation.runner import AblationRunner, ScoringGroup, score_settings
from pipeline.ablation.search_space import OWN_FOLD
from pipeline.competition.dice import confusion_counts
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
from pipeline.inference.probability_map import sum_maps
from tests.fakes.fake_ablation import FOLDS, MODELS, NETS, SIZE, VIEWS, Maps, choices, drawn

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

    def groups(self, split: ScoredSplit) -> list[ScoringGroup]:
        if split == "holdout":
            return [ScoringGroup(NETS, [PredictionStore(self.where(split, net)) for net in NETS])]
        return [
            ScoringGroup(
                [(m, OWN_FOLD) for m in MODELS], [PredictionStore(self.where(split, (m, fold))) for m in MODELS]
            )
            for fold in FOLDS
        ]

    def comparison(self, **changes: Any) -> AblationRunner:
        return AblationRunner(choices(**changes), len(HELD_OUT), self.groups, self.masks.__getitem__, self.image)

    def image(self, image_id: str) -> NDArray[np.uint8]:
        return np.repeat(self.masks[image_id][..., None] * np.uint8(200), 3, axis=2)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return Stored(tmp_path_factory.mktemp("stored"))


class TestAblationRunner:
    def test_what_is_read_from_disk_equals_brute_force(self, stored: Stored) -> None:
        for split in ("oof", "holdout"):
            grid = choices().grid(split)[::17]
            scores = score_settings(stored.groups(split), grid, VIEWS, stored.masks.__getitem__, "")
            for image, image_id in enumerate(scores.images["image_id"]):
                for index, setting in enumerate(grid):
                    own = [(m, CARS.index(image_id[:12])) if f == OWN_FOLD else (m, f) for m, f in setting.nets]
                    maps = [sum_maps([stored.maps[image_id][net, view] for view in setting.views]) for net in own]
                    expected = confusion_counts(setting.merge_rule.mask(maps), stored.masks[image_id])
                    assert scores.dice_SI[index, image] == expected.dice

    def test_tables(self, stored: Stored) -> None:
        tables = stored.comparison().run()
        table = pd.concat(tables.settings, ignore_index=True)
        assert table.groupby("split").size().to_dict() == {s: len(choices().grid(s)) for s in ("oof", "holdout")}
        assert table["current"].sum() == 2
        current = table[table["current"]].set_index("split")
        assert current["seconds"].to_dict() == pytest.approx({"oof": 2 * 2 / 6, "holdout": 6 * 2 / 6})
        assert (table["disk_bytes"] > 0).all()
        assert tables.fold_subsets["count"].value_counts().to_dict() == {1: 9, 2: 9, 3: 3}
        subset_dice = tables.fold_subsets.set_index(["models", "folds"])["dice"]
        assert subset_dice["small large", "0 1 2"] == pytest.approx(current.loc["holdout", "dice"])
        disagreement = pd.concat(tables.disagreement, ignore_index=True)
        assert disagreement.groupby("split")["image_id"].apply(list).to_dict() == {
            "oof": [ids[0] for ids in stored.oof.values()],
            "holdout": stored.held_out,
        }
        assert disagreement["nets"].tolist() == [2, 2, 2, 6, 6, 6, 6]
        assert (disagreement["disagreement"] > 0).all()

    def test_steps_after_the_merge(self, stored: Stored) -> None:
        steps = ((), ("refine_edges",), ("keep_largest", "fill_holes"))
        ablation = AblationSettings(postprocess=steps, postprocess_best=1, threshold=(0.4, 0.5))
        tables = stored.comparison(ablation=ablation).run()
        table = pd.concat(tables.postprocess, ignore_index=True)
        holdout = table[table["split"] == "holdout"]
        assert holdout["postprocess"].tolist() == ["none", "refine_edges", "keep_largest fill_holes"] * 2
        grid = pd.concat(tables.settings).query("split == 'holdout'")
        assert holdout["dice"].iloc[0] == pytest.approx(grid["dice"].iloc[0])
        assert holdout["dice"].iloc[3] == pytest.approx(grid["dice"].max())
        for number, step in enumerate(steps):
            mask_builder = MaskBuilder(choices().current("holdout").merge_rule, step, stored.image)
            dice = [
                confusion_counts(
                    mask_builder.mask([sum_maps([stored.maps[i][net, view] for view in VIEWS[:2]]) for net in NETS]),
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
        tables = stored.comparison(ablation=AblationSettings(postprocess=(), threshold=(0.5,))).run()
        assert pd.concat(tables.postprocess).empty

    def test_without_held_out_cars_folds_are_not_scored(self, stored: Stored) -> None:
        tables = replace(stored.comparison(), holdout_cars=0).run()
        assert "folds.holdout_cars" in tables.summary["holdout"]["skipped"]
        assert tables.summary["oof"]["settings"] == len(choices().grid("oof"))
        assert set(pd.concat(tables.settings)["split"]) == {"oof"}
        assert tables.fold_subsets.empty

    @pytest.mark.parametrize(
        ("images", "views", "digest", "words"),
        [
            (slice(1), VIEWS, "small0", "images differ"),
            (slice(None), VIEWS, "retrained", "earlier net"),
            (slice(None), (*VIEWS, "scale:2"), "small0", "scale:2"),
            (slice(None), VIEWS[:2], "small0", "views differ"),
        ],
    )
    def test_stale_maps(self, stored: Stored, images: slice, views: Sequence[str], digest: str, words: str) -> None:
        group = ScoringGroup([("small", 0)], [PredictionStore(stored.where("holdout", ("small", 0)))])
        with pytest.raises(CarvanaError, match=words) as caught:
            group.validate(stored.held_out[images], views, [digest])
        assert "holdout/small/0" in str(caught.value)
        group.validate(stored.held_out, VIEWS, ["small0"])

    def test_missing_maps(self, stored: Stored) -> None:
        with pytest.raises(CarvanaError, match="dvc repro"):
            PredictionStore(stored.folder / "holdout/small/9")
