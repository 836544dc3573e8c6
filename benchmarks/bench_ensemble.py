"""Merge the maps of five folds to submission rows, against averaging 8-bit PNGs in float32 (the winning solution)."""

import tempfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np

from benchmarks.bench_rle import snippet_encode
from benchmarks.timing import Row, compare
from pipeline.competition.image_ids import image_filename
from pipeline.data.competition_data import CompetitionData
from pipeline.ensemble.merge import MergeRule
from pipeline.ensemble.postprocess import MaskBuilder
from pipeline.ensemble.submission_writer import shard_rows
from pipeline.inference.prediction_store import PredictionStore, ShardWriter, shard_name, write_index
from pipeline.inference.probability_map import sum_views
from pipeline.submission.csv_file import compress_part

FOLDS = 5


@dataclass(frozen=True, eq=False)
class Ours:
    """Shards of summed uint8 probabilities, merged in integers."""

    folder: Path
    views: int

    @cached_property
    def stores(self) -> list[PredictionStore]:
        return [PredictionStore(self.folder / str(fold)) for fold in range(FOLDS)]

    def rows(self) -> bytes:
        mask_builder = MaskBuilder(MergeRule("mean_probability", 0.5, (self.views,) * FOLDS, (1,) * FOLDS))
        return "".join(f"{row}\n" for row in shard_rows(self.stores, mask_builder, str, 0)).encode()

    def __call__(self) -> None:
        compress_part(self.rows())


@dataclass(frozen=True, eq=False)
class PngMean:
    """One PNG per map, averaged in float32."""

    folder: Path
    image_ids: list[str]

    def rows(self) -> bytes:
        return "".join(f"{image_filename(i)},{snippet_encode(self._mask(i))}\n" for i in self.image_ids).encode()

    def _mask(self, image_id: str) -> np.ndarray:
        total = None
        for fold in range(FOLDS):
            probs_HW = cv2.imread(str(self.folder / str(fold) / f"{image_id}.png"), cv2.IMREAD_GRAYSCALE)
            weighted = probs_HW.astype(np.float32) * np.float32(1 / FOLDS)
            total = weighted if total is None else total + weighted
        return total >= 127.5

    def __call__(self) -> None:
        zlib.compress(self.rows(), 6)


def run(folder: Path, tiny: bool = False) -> list[Row]:
    """Return merging the maps of test images on one core, one item being an image with five folds."""
    count, rounds = (2, 1) if tiny else (8, 7)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as temporary:
        for views in (1, 2):
            image_ids = _write_maps(folder, Path(temporary) / str(views), views, count)
        rows = []
        for views, description in ((2, "sums of 2 views"), (1, "1 view")):
            ours = Ours(Path(temporary) / str(views), views)
            theirs = PngMean(Path(temporary) / str(views), image_ids)
            # With one view nothing is rounded on the way to the PNGs, so that both give the same masks.
            if views == 1 and ours.rows() != theirs.rows():
                raise AssertionError("Our masks differ from the mean of PNGs.")
            name = f"{FOLDS} folds to CSV, {description} / PNG mean"
            rows.append(compare(name, ours, theirs, count, rounds, target=10))
        return rows


def _write_maps(folder: Path, target: Path, views: int, count: int) -> list[str]:
    """Write the maps of ``count`` images as shards and as PNGs; return the image ids."""
    # Imported here: it imports torch, which would count as peak memory.
    from benchmarks.synthetic_maps import synthetic_map, write_png

    masks = CompetitionData(folder).masks
    ids = masks.ids()
    ids = ids[:: max(1, len(ids) // count)][:count]
    for fold in range(FOLDS):
        store = target / str(fold)
        store.mkdir(parents=True)
        with ShardWriter(store / shard_name(0)) as writer:
            for number, image_id in enumerate(ids):
                mask_HW = masks.mask(image_id)
                probs_VHW = np.stack([synthetic_map(mask_HW, (number, fold, view)) for view in range(views)])
                writer.add(sum_views(image_id, "synthetic", probs_VHW))
                mean_HW = np.rint(probs_VHW.mean(axis=0, dtype=np.float32)).astype(np.uint8)
                write_png(store / f"{image_id}.png", mean_HW)
            writer.note_unreadable({})
        names = [f"view {view}" for view in range(views)]
        write_index(store, ids, names, merged=True, shard_images=count, unreadable={}, digests=[""], net="")
    return ids
