"""Five folds' maps to the rows of a submission, beside averaging 8-bit PNGs in float32, as the winning solution did."""

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
    """Shards of summed levels, merged in integers."""

    folder: Path
    views: int

    @cached_property
    def stores(self) -> list[PredictionStore]:
        return [PredictionStore(self.folder / str(fold)) for fold in range(FOLDS)]

    def rows(self) -> bytes:
        decision = MaskBuilder(MergeRule("mean_probability", 0.5, (self.views,) * FOLDS, (1,) * FOLDS))
        return "".join(f"{row}\n" for row in shard_rows(self.stores, decision, str, 0)).encode()

    def __call__(self) -> None:
        compress_part(self.rows())


@dataclass(frozen=True, eq=False)
class PngMean:
    """A PNG a map, its mean taken in float32."""

    folder: Path
    image_ids: list[str]

    def rows(self) -> bytes:
        return "".join(f"{image_filename(i)},{snippet_encode(self._mask(i))}\n" for i in self.image_ids).encode()

    def _mask(self, image_id: str) -> np.ndarray:
        total = None
        for fold in range(FOLDS):
            levels = cv2.imread(str(self.folder / str(fold) / f"{image_id}.png"), cv2.IMREAD_GRAYSCALE)
            weighted = levels.astype(np.float32) * np.float32(1 / FOLDS)
            total = weighted if total is None else total + weighted
        return total >= 127.5

    def __call__(self) -> None:
        zlib.compress(self.rows(), 6)


def run(folder: Path, tiny: bool = False) -> list[Row]:
    """Return merging test images on one core, an image of five folds being an item."""
    count, rounds = (2, 1) if tiny else (8, 7)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as temporary:
        for views in (1, 2):
            image_ids = _draw(folder, Path(temporary) / str(views), views, count)
        rows = []
        for views, words in ((2, "sums of 2 views"), (1, "1 view")):
            ours = Ours(Path(temporary) / str(views), views)
            theirs = PngMean(Path(temporary) / str(views), image_ids)
            # With one view nothing is rounded on the way to the PNGs, and both must say the same.
            if views == 1 and ours.rows() != theirs.rows():
                raise AssertionError("ours and the mean of PNGs differ: nothing to compare")
            name = f"{FOLDS} folds to CSV, {words} / PNG mean"
            rows.append(compare(name, ours, theirs, count, rounds, aim=10))
        return rows


def _draw(folder: Path, target: Path, views: int, count: int) -> list[str]:
    """Write maps of ``count`` images as shards and as PNGs; return the images' ids."""
    from benchmarks.synthetic_maps import draw_levels, write_png  # imports torch, which would weigh on the peaks

    masks = CompetitionData(folder).masks
    ids = masks.ids()
    ids = ids[:: max(1, len(ids) // count)][:count]
    for fold in range(FOLDS):
        home = target / str(fold)
        home.mkdir(parents=True)
        with ShardWriter(home / shard_name(0)) as writer:
            for number, image_id in enumerate(ids):
                mask_HW = masks.mask(image_id)
                levels_VHW = np.stack([draw_levels(mask_HW, (number, fold, view)) for view in range(views)])
                writer.add(sum_views(image_id, "drawn", levels_VHW))
                write_png(home / f"{image_id}.png", np.rint(levels_VHW.mean(axis=0, dtype=np.float32)).astype(np.uint8))
            writer.note_unreadable({})
        names = [f"view {view}" for view in range(views)]
        write_index(home, ids, names, merged=True, shard_images=count, unreadable={}, digests=[""], net="")
    return ids
