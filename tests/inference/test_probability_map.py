"""Probability maps: sums, cropping, shards."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import CarvanaError
from pipeline.inference.prediction_store import PredictionStore, ShardWriter, read_shard
from pipeline.inference.probability_map import ProbabilityMap, sum_maps, sum_views
from tests.fakes.fake_maps import levels


class TestProbabilityMap:
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
        with pytest.raises(CarvanaError, match=r"shard-00000\.parquet"):
            list(read_shard(tmp_path / "shard-00000.parquet"))

    def test_missing_maps_name_the_command(self, tmp_path: Path) -> None:
        with pytest.raises(CarvanaError, match=f"{tmp_path}"):
            PredictionStore(tmp_path)
