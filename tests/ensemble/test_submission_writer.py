"""The submission: every image has its row; finished parts are kept."""

import gzip
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.competition import rle
from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.ensemble.merge import MergeRule
from pipeline.ensemble.postprocess import MaskBuilder
from pipeline.ensemble.submission_writer import mean_mask_rows, write_submission
from pipeline.errors import CarvanaError, CorruptFileError
from pipeline.inference.prediction_store import PredictionStore, PredictJob, write_predictions
from pipeline.submission.csv_file import compress_part, join_parts, read_rows
from pipeline.submission.validation import validate_submission
from tests.fakes.fake_maps import FULL, IDS, as_maps, whole


class TestParts:
    def test_joined_gzip_parts_are_readable_by_any_reader(self, tmp_path: Path) -> None:
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
        return PredictionStore(write_predictions(job, lambda ids: as_maps(job, self.predict(net, ids)), work))


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

    def test_stores_of_different_images_are_refused(self, nets: Nets, tmp_path: Path) -> None:
        other = nets.store(1, "other")
        other.image_ids = IDS[:-1]
        with pytest.raises(CarvanaError, match=r"different images.*dvc repro"):
            write_submission([nets.store(0), other], self.decision, fallback, tmp_path, tmp_path / "x.gz")
        other.image_ids, other.unreadable = IDS, {}
        with pytest.raises(CarvanaError, match="different images"):
            write_submission([nets.store(0), other], self.decision, fallback, tmp_path, tmp_path / "x.gz")

    def test_maps_in_another_order_are_refused(self, nets: Nets, tmp_path: Path) -> None:
        stores = [nets.store(0), nets.store(1)]
        for store in stores:
            store.image_ids = [IDS[1], IDS[0], *IDS[2:]]
        with pytest.raises(CarvanaError, match=f"{IDS[1]}"):
            write_submission(stores, self.decision, fallback, tmp_path, tmp_path / "x.gz")

    def test_mean_mask_rows_by_angle(self) -> None:
        def mask(image_id: str) -> NDArray[np.uint8]:
            raster = np.zeros((HEIGHT, WIDTH), np.uint8)
            raster[0, : {"a": 2, "b": 4, "c": 6}[image_id[11]]] = 1
            return raster

        ids = [f"00000000000{car}_{angle:02d}" for car in "abc" for angle in (1, 2)]
        row = mean_mask_rows(ids, mask)
        assert row("ffffffffffff_01") == "1 4"
        assert row("ffffffffffff_16") == ""
