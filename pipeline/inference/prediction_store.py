"""Stored probability maps: sharded Parquet files with an index and timings."""

import json
from collections import deque
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Annotated, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, NonNegativeInt, TypeAdapter

from pipeline.errors import CarvanaError
from pipeline.inference.probability_map import ZSTD, CompressedMap, MapRow, ProbabilityMap, sum_maps
from pipeline.utils.files import sha256_of, write_json

TIMING_FILE = "timing.json"

_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Timing:
    """Wall seconds of predicting some images, of which ``views`` tells apart what the device spent on each view.

    The first batch of a run, which warms up, is left out, unless there was no other.
    """

    images: NonNegativeInt
    seconds: _Seconds
    views: Mapping[str, _Seconds]
    device: str

    def seconds_per_image(self, views: Sequence[str]) -> float:
        """Return the seconds an image that predicting only these views would take.

        That is ``seconds / images``, apportioned by the views' shares of the device's time. So what all views have in
        common, such as reading the photograph and storing its map, is shared out with them. Raises CarvanaError
        where nothing was timed, or not one of these views.
        """
        lacking = [view for view in views if view not in self.views]
        if lacking or not self.images:
            raise CarvanaError(f"How long {lacking[0] if lacking else 'prediction'} takes was not measured.")
        # A clock too coarse to tell the views apart takes them for equal.
        spent = self.views if any(self.views.values()) else dict.fromkeys(self.views, 1.0)
        share = sum(spent[view] for view in views) / sum(spent.values()) if views else 0.0
        return share * self.seconds / self.images


WarmupAndRest = tuple[Timing, Timing]
"""What some images took: a batch that warmed up, no images where there was none, and the others."""


def total_timing(laps: Sequence[WarmupAndRest]) -> Timing:
    """Return what all the images took together, without batches that warmed up if there are others."""
    later = [timing for _, timing in laps if timing.images]
    counted = later or [first for first, _ in laps if first.images]
    views: dict[str, float] = {}
    for timing in counted:
        for view, seconds in timing.views.items():
            views[view] = views.get(view, 0.0) + seconds
    # A run may have been taken up on another device.
    device = " and ".join(dict.fromkeys(timing.device for timing in counted))
    return Timing(sum(t.images for t in counted), sum(t.seconds for t in counted), views, device)


def write_timing(path: Path, timing: Timing) -> None:
    """Write what ``read_timing`` reads; the file appears whole or not at all."""
    write_json(path, asdict(timing))


def read_timing(path: Path) -> Timing:
    """Return what was written; raises OSError, or ValueError if that is something else."""
    return TypeAdapter(Timing).validate_json(path.read_bytes(), strict=True)


def write_warmup_and_rest(path: Path, laps: WarmupAndRest) -> None:
    """Write what ``read_laps`` reads; the file appears whole or not at all."""
    write_json(path, [asdict(timing) for timing in laps])


def read_warmup_and_rest(path: Path) -> WarmupAndRest | None:
    """Return what was written, or None where nothing is that can be read: no time is worth stopping for."""
    try:
        return TypeAdapter(WarmupAndRest).validate_json(path.read_bytes(), strict=True)
    except (OSError, ValueError):
        return None


INDEX_FILE = "index.json"

REBUILD_HINT = "run 'rm -r .resume/predict', 'dvc repro --single-item --force predict' and 'dvc repro'"
"""What makes maps again that DVC and the state of resumes hold to be finished."""

_ROW_GROUP_MAPS = 32
"""Maps that are read together, still compressed."""

_WAITING_MAPS = 8
"""Maps that may wait for the thread that compresses them."""

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
"""A map by the columns of ``_SCHEMA``, its levels compressed."""


class ShardWriter:
    """Writes maps to one Parquet file while the caller computes the next ones."""

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(path, _SCHEMA, compression="none", use_dictionary=False, write_statistics=False)
        self._rows: list[MapRow] = []
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


def _to_row(level_map: ProbabilityMap) -> MapRow:
    height, width = level_map.probs_u8.shape
    return {
        "image_id": level_map.image_id,
        "view": level_map.view,
        "count": level_map.count,
        "top": level_map.top,
        "left": level_map.left,
        "height": height,
        "width": width,
        "levels": ZSTD.compress(level_map.probs_u8.tobytes(), asbytes=True),
    }
