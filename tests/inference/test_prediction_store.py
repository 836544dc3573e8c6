"""Stored predictions and how long they took."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.errors import CarvanaError
from pipeline.inference.prediction_store import (
    PredictionStore,
    PredictJob,
    Timing,
    WarmupAndRest,
    total_timing,
    write_predictions,
)
from tests.fakes.fake_maps import IDS, as_maps, whole


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
        store = PredictionStore(
            write_predictions(job, lambda ids: as_maps(job, predict(ids)), work, (lambda: next(left)) if laps else None)
        )
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

    def test_total_timing_of_a_single_batch(self) -> None:
        only = (timing(3, 9, identity=6), timing(0, 0, identity=0))
        assert total_timing([only]) == timing(3, 9, identity=6)

    def test_times_of_shards_made_before_a_kill_count(self, tmp_path: Path) -> None:
        first, none, later = timing(1, 50, identity=50), timing(0, 0, identity=0), timing(1, 2, identity=1)
        with pytest.raises(KeyboardInterrupt):
            self.store(tmp_path, (first, later), stop_at=IDS[2])
        elsewhere = timing(1, 0.5, "a GPU", identity=0.25)
        store = self.store(tmp_path, (timing(1, 70, "a GPU", identity=70), elsewhere), (none, elsewhere))
        assert store.timing() == timing(3, 3, "the CPU and a GPU", identity=1.5)

    def test_timing_does_not_change_maps_or_index(self, tmp_path: Path) -> None:
        fast = self.store(tmp_path / "a", *[(timing(0, 0), timing(1, 1, identity=1))] * 3)
        slow = self.store(tmp_path / "b", *[(timing(0, 0), timing(1, 7, identity=3))] * 3)
        assert fast.digest == slow.digest
        for path in fast.folder.iterdir():
            assert (path.read_bytes() == (slow.folder / path.name).read_bytes()) == (path.name != "timing.json")

    def test_nothing_was_timed(self, tmp_path: Path) -> None:
        store = self.store(tmp_path)
        assert json.loads((store.folder / "timing.json").read_text())["images"] == 0
        assert store.timing() is None
        with pytest.raises(CarvanaError, match="measured"):
            total_timing([]).seconds_per_image([])

    def test_unreadable_shard_timing_is_ignored(self, tmp_path: Path) -> None:
        later = (timing(0, 0), timing(1, 2, identity=1))
        with pytest.raises(KeyboardInterrupt):
            self.store(tmp_path, later, stop_at=IDS[2])
        (truncated,) = (tmp_path / "times").iterdir()
        truncated.write_text('[{"images": 1')
        assert self.store(tmp_path, later, later).timing() == timing(2, 4, identity=2)

    def test_maps_without_net_and_timing_are_read(self, tmp_path: Path) -> None:
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
    def test_invalid_timing_file_is_named(self, tmp_path: Path, text: str) -> None:
        store = self.store(tmp_path)
        (store.folder / "timing.json").write_text(text)
        with pytest.raises(CarvanaError, match=r"timing\.json"):
            store.timing()

    def test_seconds_an_image_go_by_the_views_shares(self) -> None:
        measured = timing(images=4, seconds=8, identity=3, hflip=1)
        assert measured.seconds_per_image(["identity"]) == 1.5
        assert measured.seconds_per_image(["hflip"]) == 0.5
        assert measured.seconds_per_image(["hflip", "identity"]) == 2
        assert measured.seconds_per_image([]) == 0
        with pytest.raises(CarvanaError, match=r"scale:0\.5"):
            measured.seconds_per_image(["identity", "scale:0.5"])

    def test_views_too_fast_to_tell_apart_are_equal(self) -> None:
        assert timing(images=4, seconds=8, identity=0, hflip=0).seconds_per_image(["hflip"]) == 1
