"""The store of probability maps: integer levels, cropped to where they are not zero, zstd-compressed in Parquet.

Each map is a zstd frame of its own, not left to Parquet's pages: read one by one, maps take half the time, and the
memory of one.
"""

import json
from collections import deque
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.competition.layout import HEIGHT, WIDTH
from pipeline.ensembling.timing import TIMING_FILE, Timing, read_timing
from pipeline.errors import CarvanaError
from pipeline.files import sha256_of, write_json

MAX_LEVEL = 255
"""Level of a certain pixel, in one view."""

INDEX_FILE = "index.json"

REBUILD_HINT = "run 'rm -r .resume/predict', 'dvc repro --single-item --force predict' and 'dvc repro'"
"""What makes maps again that DVC and the state of resumes hold to be finished."""

_ROW_GROUP_MAPS = 32
"""Maps that are read together, still compressed."""

_WAITING_MAPS = 8
"""Maps that may wait for the thread that compresses them."""

_ZSTD = pa.Codec("zstd", compression_level=1)

_UNREADABLE = "unreadable"

_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("view", pa.string()),
        ("count", pa.uint16()),
        ("top", pa.uint16()),
        ("left", pa.uint16()),
        ("height", pa.uint16()),
        ("width", pa.uint16()),
        ("levels", pa.binary()),
    ]
)

UnsignedImage = NDArray[np.uint8] | NDArray[np.uint16]

_Row = dict[str, Any]
"""A map by the columns of ``_SCHEMA``, its levels compressed."""


@dataclass(frozen=True)
class ProbabilityMap:
    """Levels of one image from one net: a box of the raster, 0 outside.

    ``levels`` is the exact sum of ``count`` views of 0 to 255 each, uint8 for one view and uint16 for more.
    """

    image_id: str
    view: str
    count: int
    top: int
    left: int
    probs_u8: UnsignedImage

    @classmethod
    def crop(cls, image_id: str, view: str, count: int, levels_HW: UnsignedImage) -> Self:
        """Return the map of a whole raster, cropped to where it is not zero."""
        left, top, width, height = _bounding_box(levels_HW)
        return cls(image_id, view, count, top, left, levels_HW[top : top + height, left : left + width])

    @property
    def box(self) -> tuple[slice, slice]:
        """Rows and columns of the raster that ``levels`` fills."""
        height, width = self.probs_u8.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)

    def to_full_size(self, height: int = HEIGHT, width: int = WIDTH) -> UnsignedImage:
        """Return the whole raster (height, width), of the dtype of ``levels``."""
        levels_HW = np.zeros((height, width), self.probs_u8.dtype)
        levels_HW[self.box] = self.probs_u8
        return levels_HW


@dataclass(frozen=True)
class CompressedMap:
    """A map as it is stored: whoever needs it unpacks it, on a thread of its own if there are many."""

    row: _Row

    @property
    def image_id(self) -> str:
        """The image that it is of."""
        return str(self.row["image_id"])

    @property
    def view(self) -> str:
        """The view, or the views that were summed."""
        return str(self.row["view"])

    @property
    def bytes(self) -> int:
        """What its levels take on disk."""
        return len(self.row["levels"])

    def decompress(self) -> ProbabilityMap:
        """Return the map itself."""
        row = self.row
        shape, dtype = (row["height"], row["width"]), np.dtype(np.uint8 if row["count"] == 1 else np.uint16)
        data = _ZSTD.decompress(row["levels"], shape[0] * shape[1] * dtype.itemsize)
        levels: UnsignedImage = np.frombuffer(data, dtype).reshape(shape)
        return ProbabilityMap(row["image_id"], row["view"], row["count"], row["top"], row["left"], levels)


def sum_views(image_id: str, view: str, levels_VHW: NDArray[np.uint8]) -> ProbabilityMap:
    """Return the exact sum of an image's views (V, H, W), uint8 where there is only one."""
    if len(levels_VHW) == 1:
        return ProbabilityMap.crop(image_id, view, 1, levels_VHW[0])
    return ProbabilityMap.crop(image_id, view, len(levels_VHW), levels_VHW.sum(axis=0, dtype=np.uint16))


def sum_maps(maps: Sequence[ProbabilityMap]) -> ProbabilityMap:
    """Return the exact sum of several maps of one image, in the smallest box that holds them all."""
    if len(maps) == 1:
        return maps[0]
    top, left = min(m.top for m in maps), min(m.left for m in maps)
    bottom, right = max(m.box[0].stop for m in maps), max(m.box[1].stop for m in maps)
    total = np.zeros((bottom - top, right - left), np.uint16)
    for m in maps:
        rows, columns = m.box
        total[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] += m.probs_u8
    view = "+".join(m.view for m in maps)
    return ProbabilityMap(maps[0].image_id, view, sum(m.count for m in maps), top, left, total)


class ShardWriter:
    """Writes maps to one Parquet file while the caller computes the next ones."""

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(path, _SCHEMA, compression="none", use_dictionary=False, write_statistics=False)
        self._rows: list[_Row] = []
        # One thread keeps the order; zstd lets the net go on meanwhile.
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()

    def add(self, level_map: ProbabilityMap) -> None:
        """Add a map, whose levels must not change any more; raises what went wrong with earlier ones."""
        if len(self._waiting) == _WAITING_MAPS:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._compress, level_map))

    def note_unreadable(self, reasons: Mapping[str, str]) -> None:
        """Keep in the file which images have no map, and why."""
        self._writer.add_key_value_metadata({_UNREADABLE: json.dumps(reasons)})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                while self._waiting:
                    self._waiting.popleft().result()
                self._write()
        finally:
            self._pool.shutdown(cancel_futures=True)
            self._writer.close()

    def _compress(self, level_map: ProbabilityMap) -> None:
        self._rows.append(_to_row(level_map))
        if len(self._rows) == _ROW_GROUP_MAPS:
            self._write()

    def _write(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, _SCHEMA))
            self._rows = []


class PredictionStore:
    """A folder of shards with an index: the maps of one net on one split.

    Raises CarvanaError that says which command makes it, if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            text = (folder / INDEX_FILE).read_bytes()
            index = json.loads(text)
            self.digest = sha256_of(text)
            self.views: list[str] = index["views"]
            self.merged: bool = index["merged"]
            self.image_ids: list[str] = index["image_ids"]
            self.unreadable: dict[str, str] = index["unreadable"]
            self.shard_images: int = index["shard_images"]
            self.net: str | None = index.get("net")
            """Digest of the net that predicted; older indexes have none."""
        except (OSError, ValueError, KeyError) as error:
            raise CarvanaError(f"{folder} holds no maps ({error}): make them with 'dvc repro'.") from error

    def timing(self) -> Timing | None:
        """Return how long predicting took, or None where that was not measured.

        Raises CarvanaError that names the file if it holds something else.
        """
        path = self.folder / TIMING_FILE
        if not path.exists():
            return None
        try:
            timing = read_timing(path)
        except (OSError, ValueError) as error:
            raise CarvanaError(f"{path} can't be read ({error}): {REBUILD_HINT}.") from error
        return timing if timing.images else None

    def shard_count(self) -> int:
        """Return how many files the maps are in."""
        return len(range(0, len(self.image_ids), self.shard_images))

    def shard_ids(self, number: int) -> list[str]:
        """Return the ids of the images in a file, readable or not, in order."""
        start = number * self.shard_images
        return self.image_ids[start : start + self.shard_images]

    def shard(self, number: int) -> Iterator[ProbabilityMap]:
        """Yield the maps of a file in order of their images, then views."""
        return read_shard(self.folder / shard_name(number))

    def compressed(self, number: int, image_ids: Container[str] | None = None) -> Iterator[list[CompressedMap]]:
        """Yield the maps of each image in a file, or of some, one a view, as they are stored."""
        rows = read_compressed(self.folder / shard_name(number), image_ids)
        for _, maps in groupby(rows, lambda packed: packed.image_id):
            yield list(maps)

    def images(self, number: int, views: Sequence[str] | None = None) -> Iterator[ProbabilityMap]:
        """Yield the sum over ``views`` (all where None) of each readable image in a file.

        Raises CarvanaError if a view was not predicted, or not kept apart from the others.
        """
        return self._sums(self.shard(number), views)

    def iter_images(self, image_ids: Container[str], views: Sequence[str] | None = None) -> Iterator[ProbabilityMap]:
        """Yield what ``images`` does of some images of all files, in order, and decompress no other map."""
        for number in range(self.shard_count()):
            if any(image_id in image_ids for image_id in self.shard_ids(number)):
                yield from self._sums(read_shard(self.folder / shard_name(number), image_ids), views)

    def _sums(self, level_maps: Iterator[ProbabilityMap], views: Sequence[str] | None) -> Iterator[ProbabilityMap]:
        if views is not None and sorted(views) != sorted(self.views):
            self._require_views(views)
        chosen = None if views is None or self.merged else set(views)
        maps: list[ProbabilityMap] = []
        for level_map in level_maps:
            if maps and maps[0].image_id != level_map.image_id:
                yield sum_maps(maps)
                maps = []
            if chosen is None or level_map.view in chosen:
                maps.append(level_map)
        if maps:
            yield sum_maps(maps)

    def _require_views(self, views: Sequence[str]) -> None:
        lacking = sorted(set(views) - set(self.views))
        if lacking or self.merged:
            fault = f"no view {lacking[0]}" if lacking else f"only the sum of {', '.join(self.views)}"
            raise CarvanaError(f"{self.folder} holds {fault}: add what you need to predict.tta and run 'dvc repro'.")


def write_index(
    folder: Path,
    image_ids: Sequence[str],
    views: Sequence[str],
    *,
    merged: bool,
    shard_images: int,
    unreadable: Mapping[str, str],
    digests: Sequence[str],
    net: str,
) -> None:
    """Write what ``MapStore`` reads first; ``digests`` of the shards make the index stand for their content.

    ``net`` is the digest of the net that predicted.
    """
    index = {
        "net": net,
        "views": list(views),
        "merged": merged,
        "shard_images": shard_images,
        "unreadable": dict(unreadable),
        "digests": list(digests),
        "image_ids": list(image_ids),
    }
    write_json(folder / INDEX_FILE, index)


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:05d}.parquet"


def read_shard(path: Path, image_ids: Container[str] | None = None) -> Iterator[ProbabilityMap]:
    """Yield the maps of a file, or of some images; raises CarvanaError that names it if it can't be read."""
    for packed in read_compressed(path, image_ids):
        yield packed.decompress()


def read_compressed(path: Path, image_ids: Container[str] | None = None) -> Iterator[CompressedMap]:
    """Yield the maps of a file, or of some images, as they are stored; raises as ``read_shard`` does."""
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                if image_ids is not None and not any(name in image_ids for name in _ids_of(file, group)):
                    continue
                # On one thread: there is nothing to share out, and shards are read side by side.
                for row in file.read_row_group(group, use_threads=False).to_pylist():
                    if image_ids is None or row["image_id"] in image_ids:
                        yield CompressedMap(row)
    except (OSError, pa.ArrowException) as error:
        raise CarvanaError(
            f"{path} can't be read ({error}): if it is damaged, 'find .dvc/cache -samefile {path} -delete', and "
            f"{REBUILD_HINT}."
        ) from error


def _ids_of(file: pq.ParquetFile, group: int) -> list[str]:
    names: list[str] = file.read_row_group(group, columns=["image_id"], use_threads=False)["image_id"].to_pylist()
    return names


def read_unreadable(path: Path) -> dict[str, str]:
    """Return which images of a file have no map, and why."""
    notes: dict[str, str] = json.loads(pq.read_metadata(path).metadata[_UNREADABLE.encode()])
    return notes


def _to_row(level_map: ProbabilityMap) -> _Row:
    height, width = level_map.probs_u8.shape
    return {
        "image_id": level_map.image_id,
        "view": level_map.view,
        "count": level_map.count,
        "top": level_map.top,
        "left": level_map.left,
        "height": height,
        "width": width,
        "levels": _ZSTD.compress(level_map.probs_u8.tobytes(), asbytes=True),
    }


def _bounding_box(levels_HW: UnsignedImage) -> tuple[int, int, int, int]:
    """Return left, top, width and height of what is not zero; zero width and height where nothing is."""
    if levels_HW.dtype == np.uint16:
        # OpenCV takes 8 bits: any set bit of a sum will do.
        levels_HW = (levels_HW != 0).view(np.uint8)
    left, top, width, height = cv2.boundingRect(levels_HW)
    return left, top, width, height
