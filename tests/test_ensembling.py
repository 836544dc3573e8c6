"""Maps, merging and the submission's parts: exact, and the same everywhere."""

import gzip
import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.competition import rle
from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.config import EnsembleSettings
from pipeline.ensemble.evaluation import EnsembleContext, Evaluation
from pipeline.ensemble.merge import MergeRule
from pipeline.ensemble.postprocess import MaskBuilder, no_image
from pipeline.ensemble.submission_writer import mean_mask_rows, write_submission
from pipeline.errors import CarvanaError, CorruptFileError
from pipeline.inference.prediction_store import (
    PredictionStore,
    ShardWriter,
    Timing,
    WarmupAndRest,
    read_shard,
    total_timing,
)
from pipeline.inference.prediction_writer import PredictJob, write_predictions
from pipeline.inference.probability_map import ProbabilityMap, sum_maps, sum_views
from pipeline.submission.csv_file import compress_part, join_parts, read_rows
from pipeline.submission.validation import validate_submission

IDS = [f"0123456789ab_{angle:02d}" for angle in range(1, 6)]
FULL = 255


def levels(seed: int, height: int = 40, width: int = 50, views: int = 1) -> NDArray[np.uint8]:
    """Views of a picture that are certain in most places, as those of trained nets are."""
    random = np.random.default_rng(seed)
    raster = random.integers(0, 256, (views, height, width), np.uint8)
    raster[:, random.random((height, width)) < 0.4] = 0
    raster[:, :7] = 0
    raster[:, :, -5:] = 0
    return raster


def whole(seed: int, views: int = 1) -> NDArray[np.uint8]:
    raster = np.zeros((views, HEIGHT, WIDTH), np.uint8)
    raster[:, 300:340, 500:550] = levels(seed, views=views)
    return raster


class TestMaps:
    @pytest.mark.parametrize("views", [1, 2, 5])
    def test_sums_are_exact_and_cropped(self, views: int) -> None:
        raster = levels(0, views=views)
        level_map = sum_views("a", "all", raster)
        assert level_map.probs_u8.dtype == (np.uint8 if views == 1 else np.uint16)
        assert level_map.count == views
        assert np.array_equal(level_map.to_full_size(40, 50), raster.sum(axis=0, dtype=np.int64))
        assert level_map.probs_u8.size < 40 * 50

    def test_summing_stored_views_is_summing_them_at_once(self) -> None:
        raster = levels(1, views=3)
        raster[1] = np.roll(raster[1], 4, axis=1)
        apart = [ProbabilityMap.crop("a", str(n), 1, view) for n, view in enumerate(raster)]
        assert np.array_equal(sum_maps(apart).to_full_size(40, 50), sum_views("a", "x", raster).to_full_size(40, 50))

    def test_an_empty_map(self, tmp_path: Path) -> None:
        empty = ProbabilityMap.crop("a", "identity", 1, np.zeros((40, 50), np.uint8))
        with ShardWriter(tmp_path / "s") as writer:
            writer.add(empty)
            writer.note_unreadable({})
        (read,) = read_shard(tmp_path / "s")
        assert not read.to_full_size(40, 50).any()
        assert not sum_maps([read, empty]).to_full_size(40, 50).any()

    def test_shards_keep_every_level(self, tmp_path: Path) -> None:
        maps = [sum_views(f"{n}", "v", levels(n, views=1 + n % 2)) for n in range(20)]
        with ShardWriter(tmp_path / "s") as writer:
            for level_map in maps:
                writer.add(level_map)
            writer.note_unreadable({"x": "truncated"})
        for read, written in zip(read_shard(tmp_path / "s"), maps, strict=True):
            assert (read.image_id, read.view, read.count) == (written.image_id, written.view, written.count)
            assert np.array_equal(read.to_full_size(40, 50), written.to_full_size(40, 50))

    def test_a_damaged_shard_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "shard-00000.parquet").write_bytes(b"PAR1 and nothing else")
        with pytest.raises(CarvanaError, match=r"shard-00000\.parquet can't be read"):
            list(read_shard(tmp_path / "shard-00000.parquet"))

    def test_missing_maps_name_the_command(self, tmp_path: Path) -> None:
        with pytest.raises(CarvanaError, match=r"holds no maps.*dvc repro"):
            PredictionStore(tmp_path)


def timing(images: int = 4, seconds: float = 8.0, device: str = "the CPU", **views: float) -> Timing:
    return Timing(images, seconds, views, device)


class TestTiming:
    """Five images in three shards, by a net whose stopwatch says what the test wants."""

    def store(self, work: Path, *laps: WarmupAndRest, stop_at: str = "") -> PredictionStore:
        """Make what maps are lacking; one pair of ``laps`` for each shard that is made, no stopwatch where none."""
        left = iter(laps)

        def predict(ids: Sequence[str]) -> Iterator[tuple[str, NDArray[np.uint8]]]:
            for image_id in ids:
                if image_id == stop_at:
                    raise KeyboardInterrupt
                yield image_id, whole(IDS.index(image_id))

        work.mkdir(exist_ok=True)
        job = PredictJob(IDS, ["identity"], shard_images=2, test=True, net="a net")
        store = PredictionStore(write_predictions(job, predict, work, (lambda: next(left)) if laps else None))
        assert not list(left)
        return store

    def test_the_first_batch_of_a_run_is_left_out(self, tmp_path: Path) -> None:
        first, none = timing(1, 99, identity=99), timing(0, 0, identity=0)
        store = self.store(
            tmp_path,
            (first, timing(1, 2, identity=1)),
            (none, timing(2, 3, identity=1)),
            (none, timing(1, 1, identity=0.5)),
        )
        assert store.timing() == timing(4, 6, identity=2.5)
        assert store.net == "a net"
        shards = [f"shard-0000{number}.parquet" for number in range(3)]
        assert sorted(path.name for path in store.folder.iterdir()) == ["index.json", *shards, "timing.json"]

    def test_the_only_batch_is_not(self) -> None:
        only = (timing(3, 9, identity=6), timing(0, 0, identity=0))
        assert total_timing([only]) == timing(3, 9, identity=6)

    def test_times_of_shards_made_before_a_kill_count(self, tmp_path: Path) -> None:
        first, none, later = timing(1, 50, identity=50), timing(0, 0, identity=0), timing(1, 2, identity=1)
        with pytest.raises(KeyboardInterrupt):
            self.store(tmp_path, (first, later), stop_at=IDS[2])
        elsewhere = timing(1, 0.5, "a GPU", identity=0.25)
        store = self.store(tmp_path, (timing(1, 70, "a GPU", identity=70), elsewhere), (none, elsewhere))
        assert store.timing() == timing(3, 3, "the CPU and a GPU", identity=1.5)

    def test_maps_and_index_do_not_know_the_time(self, tmp_path: Path) -> None:
        fast = self.store(tmp_path / "a", *[(timing(0, 0), timing(1, 1, identity=1))] * 3)
        slow = self.store(tmp_path / "b", *[(timing(0, 0), timing(1, 7, identity=3))] * 3)
        assert fast.digest == slow.digest
        for path in fast.folder.iterdir():
            assert (path.read_bytes() == (slow.folder / path.name).read_bytes()) == (path.name != "timing.json")

    def test_nothing_was_timed(self, tmp_path: Path) -> None:
        store = self.store(tmp_path)
        assert json.loads((store.folder / "timing.json").read_text())["images"] == 0
        assert store.timing() is None
        with pytest.raises(CarvanaError, match="was not measured"):
            total_timing([]).seconds_per_image([])

    def test_a_torn_time_of_a_shard_stops_nobody(self, tmp_path: Path) -> None:
        later = (timing(0, 0), timing(1, 2, identity=1))
        with pytest.raises(KeyboardInterrupt):
            self.store(tmp_path, later, stop_at=IDS[2])
        (truncated,) = (tmp_path / "times").iterdir()
        truncated.write_text('[{"images": 1')
        assert self.store(tmp_path, later, later).timing() == timing(2, 4, identity=2)

    def test_older_maps_know_neither_net_nor_time(self, tmp_path: Path) -> None:
        folder = self.store(tmp_path).folder
        index = json.loads((folder / "index.json").read_text())
        del index["net"]
        (folder / "index.json").write_text(json.dumps(index))
        (folder / "timing.json").unlink()
        assert PredictionStore(folder).net is None
        assert PredictionStore(folder).timing() is None

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            '{"images": 1, "seconds": 1, "views": {}}',
            '{"images": 1, "seconds": 1, "views": ["identity"], "device": "the CPU"}',
            '{"images": "1", "seconds": 1, "views": {}, "device": "the CPU"}',
            '{"images": -1, "seconds": 1, "views": {}, "device": "the CPU"}',
            '{"images": 1, "seconds": NaN, "views": {}, "device": "the CPU"}',
            '{"images": 1, "seconds": 1, "views": {"identity": -1}, "device": "the CPU"}',
        ],
    )
    def test_what_is_no_timing_is_named(self, tmp_path: Path, text: str) -> None:
        store = self.store(tmp_path)
        (store.folder / "timing.json").write_text(text)
        with pytest.raises(CarvanaError, match=r"timing\.json can't be read"):
            store.timing()

    def test_seconds_an_image_go_by_the_views_shares(self) -> None:
        measured = timing(images=4, seconds=8, identity=3, hflip=1)
        assert measured.seconds_per_image(["identity"]) == 1.5
        assert measured.seconds_per_image(["hflip"]) == 0.5
        assert measured.seconds_per_image(["hflip", "identity"]) == 2
        assert measured.seconds_per_image([]) == 0
        with pytest.raises(CarvanaError, match=r"How long scale:0\.5 takes was not measured"):
            measured.seconds_per_image(["identity", "scale:0.5"])

    def test_views_too_fast_to_tell_apart_are_equal(self) -> None:
        assert timing(images=4, seconds=8, identity=0, hflip=0).seconds_per_image(["hflip"]) == 1


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

    def test_logits_follow_the_float_mean_but_where_it_is_a_tie(self) -> None:
        views = [levels(seed, views=1) for seed in range(3)]
        maps = [sum_views("a", "v", raster) for raster in views]
        mask = MergeRule("mean_logit", 0.5, (1, 1, 1), (2, 1, 1)).mask(maps, 40, 50)
        clipped = [np.clip(raster[0] / FULL, 0.5 / FULL, 1 - 0.5 / FULL) for raster in views]
        mean = sum(w * np.log(p / (1 - p)) for w, p in zip((2, 1, 1), clipped, strict=True)) / 4
        clear = np.abs(mean) > 1e-3
        assert np.array_equal(mask[clear], mean[clear] >= 0)
        assert clear.mean() > 0.9

    def test_ties_are_car(self) -> None:
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
    def test_what_every_net_calls_certain_is_so_at_any_threshold(self, name: str, threshold: float) -> None:
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
    def test_whatever_the_weights_more_level_is_never_less_car(self, name: str, weight: int) -> None:
        merge = MergeRule(name, 0.5, (2,) * 10, (weight, weight - weight // 1000) * 5)
        ramp = ProbabilityMap("a", "v", 2, 0, 0, np.arange(511, dtype=np.uint16)[None])
        mask = merge.mask([ramp] * 10, 1, 511)[0]
        assert mask.tolist() == [level >= 255 for level in range(511)]


class TestParts:
    def test_any_reader_gets_the_text(self, tmp_path: Path) -> None:
        texts = [b"one\n", b"", b"two\n" * 5000]
        for number, text in enumerate(texts):
            (tmp_path / f"{number}").write_bytes(compress_part(text))
        join_parts([tmp_path / f"{number}" for number in range(3)], tmp_path / "x.gz")
        assert gzip.decompress((tmp_path / "x.gz").read_bytes()) == b"".join(texts)
        told = subprocess.run(["gzip", "-dc", tmp_path / "x.gz"], capture_output=True, check=True)
        assert told.stdout == b"".join(texts)


class Nets:
    """Two nets' predictions of the same images, one image of which can't be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []

    def predict(self, net: int, ids: list[str]):
        for image_id in ids:
            self.asked.append(image_id)
            truncated = image_id == IDS[2]
            yield (
                image_id,
                CorruptFileError("truncated") if truncated else whole(net * 100 + IDS.index(image_id), views=2),
            )

    def store(self, net: int, name: str = "maps") -> PredictionStore:
        work = self.folder / name / str(net)
        work.mkdir(parents=True, exist_ok=True)
        job = PredictJob(IDS, ["identity", "hflip"], shard_images=2, test=True, net="n")
        return PredictionStore(write_predictions(job, lambda ids: self.predict(net, ids), work))


@pytest.fixture
def nets(tmp_path: Path) -> Nets:
    return Nets(tmp_path)


def fallback(image_id: str) -> str:
    return "1 3"


class TestSubmission:
    decision = MaskBuilder(MergeRule("mean_probability", 0.5, (2, 2), (1, 1)))

    def expected(self, image_id: str) -> str:
        if image_id == IDS[2]:
            return "1 3"
        sums = sum(whole(net * 100 + IDS.index(image_id), views=2).sum(axis=0, dtype=np.int64) for net in (0, 1))
        return rle.encode(2 * sums >= FULL * 4)

    def test_every_image_has_its_row(self, nets: Nets, tmp_path: Path) -> None:
        target = tmp_path / "out.csv.gz"
        (tmp_path / "work").mkdir()
        write_submission([nets.store(0), nets.store(1)], self.decision, fallback, tmp_path / "work", target)
        assert validate_submission(target, IDS).rows == len(IDS)
        assert {image_id: text for _, image_id, text in read_rows(target)} == {i: self.expected(i) for i in IDS}

    def test_finished_shards_and_parts_are_kept(self, nets: Nets, tmp_path: Path) -> None:
        first = nets.store(0)
        before = first.digest
        (first.folder / "shard-00001.parquet").unlink()
        nets.asked.clear()
        assert nets.store(0).digest == before
        assert nets.asked == IDS[2:4]
        assert PredictionStore(first.folder).unreadable == {IDS[2]: "truncated"}

        (tmp_path / "work").mkdir()
        stores = [first, nets.store(1)]
        write_submission(stores, self.decision, fallback, tmp_path / "work", tmp_path / "a.gz")
        parts = sorted((tmp_path / "work").iterdir())
        parts[0].unlink()
        write_submission(stores, self.decision, fallback, tmp_path / "work", tmp_path / "b.gz")
        assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()

    def test_nets_that_disagree_are_named(self, nets: Nets, tmp_path: Path) -> None:
        other = nets.store(1, "other")
        other.image_ids = IDS[:-1]
        with pytest.raises(
            CarvanaError, match=r"hold maps of different images: run 'rm -r .resume/predict', 'dvc repro --single"
        ):
            write_submission([nets.store(0), other], self.decision, fallback, tmp_path, tmp_path / "x.gz")
        other.image_ids, other.unreadable = IDS, {}
        with pytest.raises(CarvanaError, match="hold maps of different images"):
            write_submission([nets.store(0), other], self.decision, fallback, tmp_path, tmp_path / "x.gz")

    def test_maps_in_another_order_are_never_merged(self, nets: Nets, tmp_path: Path) -> None:
        stores = [nets.store(0), nets.store(1)]
        for store in stores:
            store.image_ids = [IDS[1], IDS[0], *IDS[2:]]
        with pytest.raises(CarvanaError, match=f"The maps of {IDS[1]} are missing or out of order"):
            write_submission(stores, self.decision, fallback, tmp_path, tmp_path / "x.gz")

    def test_the_mean_mask_of_an_angle(self) -> None:
        def mask(image_id: str) -> NDArray[np.uint8]:
            raster = np.zeros((HEIGHT, WIDTH), np.uint8)
            raster[0, : {"a": 2, "b": 4, "c": 6}[image_id[11]]] = 1
            return raster

        ids = [f"00000000000{car}_{angle:02d}" for car in "abc" for angle in (1, 2)]
        row = mean_mask_rows(ids, mask)
        assert row("ffffffffffff_01") == "1 4"
        assert row("ffffffffffff_16") == ""


class TestEvaluation:
    """Two models: ``good`` is right, and ``bad`` sees less of a car the higher the angle; both are merged."""

    cars = (IDS, [f"ba9876543210_{angle:02d}" for angle in range(1, 4)])

    @staticmethod
    def truth(image_id: str) -> NDArray[np.uint8]:
        mask_HW = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask_HW[300:320, 500:540] = 1
        return mask_HW

    def predicted(self, model: str, image_id: str) -> NDArray[np.uint8]:
        """Views of an image: ``good`` is right; ``bad`` finds a part that shrinks with the angle, in identity alone."""
        levels_VHW = np.stack([self.truth(image_id) * np.uint8(255)] * 2)
        if model == "bad":
            levels_VHW[0, :, 500 + 40 // int(image_id[-2:]) :] = 0
            levels_VHW[1] = 0
        return levels_VHW

    def evaluation(self, folder: Path, **changes: Any) -> Evaluation:
        def store(split: str, model: str, fold: int) -> PredictionStore:
            ids = self.cars[1] if split == "holdout" else self.cars[0][:2] if fold == 0 else self.cars[0][2:]
            work = folder / split / model / str(fold)
            work.mkdir(parents=True, exist_ok=True)
            job = PredictJob(ids, ["identity", "hflip"], shard_images=2, test=False, net="n")
            return PredictionStore(
                write_predictions(job, lambda some: ((i, self.predicted(model, i)) for i in some), work)
            )

        both = [(model, fold) for model in ("good", "bad") for fold in (0, 1)]
        whole = EnsembleContext(
            settings=EnsembleSettings(threshold=0.75),
            views=["identity"],
            models=["good", "bad"],
            folds=[0, 1],
            ensemble=both,
            store=store,
            image=no_image,
        )
        return Evaluation(replace(whole, **changes), self.truth)

    @staticmethod
    def dice_of(share: float) -> float:
        return 2 * share / (1 + share)

    def test_each_model_and_the_ensemble_are_scored_by_image(self, tmp_path: Path) -> None:
        scores = self.evaluation(tmp_path).score(holdout=True)
        summary = scores.summary()
        shares = [1 / angle for angle in range(1, 6)]
        bad = [self.dice_of(int(40 * share) / 40) for share in shares]
        assert summary["oof"]["good"] == {"dice": 1, "iou": 1, "accuracy": 1, "images": 5, "cars": 1}
        assert summary["oof"]["bad"]["dice"] == pytest.approx(np.mean(bad), abs=1e-6)
        # At 0.75, both must see it.
        assert summary["oof"]["ensemble"]["dice"] == summary["oof"]["bad"]["dice"]
        assert summary["holdout"]["dice"] == pytest.approx(np.mean(bad[:3]), abs=1e-6)
        assert summary["holdout"]["images"] == 3
        assert set(scores.by_car()["car"]) == {"0123456789ab", "ba9876543210"}

    def test_the_ensemble_is_merged_as_its_settings_say(self, tmp_path: Path) -> None:
        weighted = EnsembleSettings(threshold=0.75, weights={"good": 4})
        summary = self.evaluation(tmp_path, settings=weighted).score(holdout=True).summary()
        assert summary["holdout"]["dice"] == summary["oof"]["ensemble"]["dice"] == 1
        assert summary["oof"]["bad"]["dice"] < 1

    def test_views_are_those_of_the_submission(self, tmp_path: Path) -> None:
        summary = self.evaluation(tmp_path, views=["identity", "hflip"]).score(holdout=False).summary()
        assert (summary["oof"]["good"]["dice"], summary["oof"]["bad"]["dice"]) == (1, 0)
        assert "holdout" not in summary
        with pytest.raises(CarvanaError, match=r"no view scale:0\.5"):
            self.evaluation(tmp_path, views=["scale:0.5"]).score(holdout=False)

    def test_the_worst_are_those_of_what_is_submitted(self, tmp_path: Path) -> None:
        evaluation = self.evaluation(tmp_path)
        found = list(evaluation.worst_images(evaluation.score(holdout=True), 2))
        assert [(row.model, row.image_id) for row, _ in found] == [("ensemble", IDS[4]), ("ensemble", IDS[3])]
        assert [int(mask_HW.sum()) for _, mask_HW in found] == [20 * 8, 20 * 10]
        alone = self.evaluation(tmp_path, ensemble=[("good", 0), ("good", 1)])
        assert {row.model for row, _ in alone.worst_images(alone.score(holdout=False), 3)} == {"good"}
