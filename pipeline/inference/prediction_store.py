"""Stored probability maps of one net on one split: Parquet shards, an index and the time that prediction took."""

import itertools
import json
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, NonNegativeInt, TypeAdapter
from tqdm import tqdm

from pipeline.errors import CarvanaError, CorruptFileError
from pipeline.inference.probability_map import ZSTD, CompressedMap, MapRow, ProbabilityMap, sum_maps
from pipeline.utils.files import atomic_write, sha256_of, sha256_of_file, write_json

TIMING_FILE = "timing.json"

_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Timing:
    """Time of predicting some images: wall-clock seconds for all views, and device seconds per view.

    The warm-up batch of a run is left out, unless there is no other batch.
    """

    images: NonNegativeInt
    seconds: _Seconds
    views: Mapping[str, _Seconds]
    device: str

    def seconds_per_image(self, views: Sequence[str]) -> float:
        """Return the seconds per image of predicting only these views.

        That is the views' share of the device time, applied to ``seconds / images``. Work that all views share, such
        as reading the image and storing its map, is divided in the same proportion. Raises CarvanaError if a view was
        not timed.
        """
        missing = [view for view in views if view not in self.views]
        if missing or not self.images:
            raise CarvanaError(f"The time of {missing[0] if missing else 'prediction'} was not measured.")
        # Where the clock is too coarse to measure any view, they count as equal.
        seconds = self.views if any(self.views.values()) else dict.fromkeys(self.views, 1.0)
        share = sum(seconds[view] for view in views) / sum(seconds.values()) if views else 0.0
        return share * self.seconds / self.images


WarmupAndRest = tuple[Timing, Timing]
"""Times of the warm-up batch (no images if there was none) and of the other batches."""


def total_timing(records: Sequence[WarmupAndRest]) -> Timing:
    """Return the total time, without warm-up batches if there are others."""
    rest = [timing for _, timing in records if timing.images]
    counted = rest or [warmup for warmup, _ in records if warmup.images]
    views: dict[str, float] = {}
    for timing in counted:
        for view, seconds in timing.views.items():
            views[view] = views.get(view, 0.0) + seconds
    # A run may have been resumed on another device.
    device = " and ".join(dict.fromkeys(timing.device for timing in counted))
    return Timing(sum(t.images for t in counted), sum(t.seconds for t in counted), views, device)


def write_timing(path: Path, timing: Timing) -> None:
    """Write a timing as JSON; the file appears whole or not at all."""
    write_json(path, asdict(timing))


def read_timing(path: Path) -> Timing:
    """Return the timing in a file; raises OSError if it can't be read, ValueError if it is not valid."""
    return TypeAdapter(Timing).validate_json(path.read_bytes(), strict=True)


def write_warmup_and_rest(path: Path, record: WarmupAndRest) -> None:
    """Write a pair of timings as JSON; the file appears whole or not at all."""
    write_json(path, [asdict(timing) for timing in record])


def read_warmup_and_rest(path: Path) -> WarmupAndRest | None:
    """Return the pair of timings in a file, or None if it is missing or not valid: prediction goes on without it."""
    try:
        return TypeAdapter(WarmupAndRest).validate_json(path.read_bytes(), strict=True)
    except (OSError, ValueError):
        return None


INDEX_FILE = "index.json"

REBUILD_HINT = "run 'rm -r .resume/predict', 'dvc repro --single-item --force predict' and 'dvc repro'"
"""How to create maps again that DVC and the run state consider finished."""

_ROW_GROUP_MAPS = 32
"""Maps per row group; a row group is read at once, still compressed."""

_WAITING_MAPS = 8
"""Maximum number of maps that wait to be compressed."""

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
"""Columns of a shard: one row per map, see ``ProbabilityMap``; ``levels`` are its probabilities, compressed."""


class ShardWriter:
    """Writes maps to one Parquet file in a thread, while the caller computes the next ones."""

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(path, _SCHEMA, compression="none", use_dictionary=False, write_statistics=False)
        self._rows: list[MapRow] = []
        # One thread keeps the order; zstd releases the GIL, so that the net goes on meanwhile.
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()

    def add(self, prob_map: ProbabilityMap) -> None:
        """Add a map, whose array must not change any more; raises the error of writing an earlier one."""
        if len(self._waiting) == _WAITING_MAPS:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._compress, prob_map))

    def note_unreadable(self, reasons: Mapping[str, str]) -> None:
        """Record the images without a map, with the error of reading each."""
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

    def _compress(self, prob_map: ProbabilityMap) -> None:
        self._rows.append(_to_row(prob_map))
        if len(self._rows) == _ROW_GROUP_MAPS:
            self._write()

    def _write(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, _SCHEMA))
            self._rows = []


class PredictionStore:
    """A folder of shards with an index: the maps of one net on one split.

    Raises CarvanaError if the index is missing or not valid.
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
            """Digest of the net that predicted; None in older indexes."""
        except (OSError, ValueError, KeyError) as error:
            raise CarvanaError(f"{folder} has no predictions ({error}). Run 'dvc repro'.") from error

    def timing(self) -> Timing | None:
        """Return the time that prediction took, or None if it was not measured.

        Raises CarvanaError, which names the file, if the timing is not valid.
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
        """Return the number of shards."""
        return len(range(0, len(self.image_ids), self.shard_images))

    def shard_ids(self, number: int) -> list[str]:
        """Return the ids of the images in a shard, readable or not, in order."""
        start = number * self.shard_images
        return self.image_ids[start : start + self.shard_images]

    def shard(self, number: int) -> Iterator[ProbabilityMap]:
        """Yield the maps in a shard, ordered by image, then by view."""
        return read_shard(self.folder / shard_name(number))

    def compressed(self, number: int, image_ids: Container[str] | None = None) -> Iterator[list[CompressedMap]]:
        """Yield the compressed maps of each image in a shard (all images if None), one per view."""
        rows = read_compressed(self.folder / shard_name(number), image_ids)
        for _, maps in groupby(rows, lambda compressed: compressed.image_id):
            yield list(maps)

    def images(self, number: int, views: Sequence[str] | None = None) -> Iterator[ProbabilityMap]:
        """Yield the sum over ``views`` (all if None) for each readable image in a shard.

        Raises CarvanaError if a view was not predicted, or is stored only in the sum of all views.
        """
        return self._sum_views(self.shard(number), views)

    def iter_images(self, image_ids: Container[str], views: Sequence[str] | None = None) -> Iterator[ProbabilityMap]:
        """Yield the same as ``images`` for some images of all shards, in order, decompressing only their maps."""
        for number in range(self.shard_count()):
            if any(image_id in image_ids for image_id in self.shard_ids(number)):
                yield from self._sum_views(read_shard(self.folder / shard_name(number), image_ids), views)

    def _sum_views(self, prob_maps: Iterator[ProbabilityMap], views: Sequence[str] | None) -> Iterator[ProbabilityMap]:
        if views is not None and sorted(views) != sorted(self.views):
            self._require_views(views)
        chosen = None if views is None or self.merged else set(views)
        for _, maps in groupby(prob_maps, lambda prob_map: prob_map.image_id):
            selected = [prob_map for prob_map in maps if chosen is None or prob_map.view in chosen]
            if selected:
                yield sum_maps(selected)

    def _require_views(self, views: Sequence[str]) -> None:
        missing = sorted(set(views) - set(self.views))
        if missing or self.merged:
            reason = f"no view {missing[0]}" if missing else f"only the sum of {', '.join(self.views)}"
            raise CarvanaError(f"{self.folder} has {reason}. Add the views to predict.tta and run 'dvc repro'.")


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
    """Write the index of a ``PredictionStore``; the file appears whole or not at all.

    ``digests`` are those of the shards, so that the digest of the index covers their content. ``net`` is the digest of
    the net that predicted.
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
    """Yield the maps in a shard (of all images if None); raises CarvanaError, which names it, if it can't be read."""
    for compressed in read_compressed(path, image_ids):
        yield compressed.decompress()


def read_compressed(path: Path, image_ids: Container[str] | None = None) -> Iterator[CompressedMap]:
    """Yield the same maps as ``read_shard``, still compressed; raises the same error."""
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                if image_ids is not None and not any(name in image_ids for name in _group_ids(file, group)):
                    continue
                # On one thread: a row group is small, and several shards are read in parallel.
                for row in file.read_row_group(group, use_threads=False).to_pylist():
                    if image_ids is None or row["image_id"] in image_ids:
                        yield CompressedMap(row)
    except (OSError, pa.ArrowException) as error:
        raise CarvanaError(
            f"{path} can't be read ({error}). If it is corrupt, run 'find .dvc/cache -samefile {path} -delete', then "
            f"{REBUILD_HINT}."
        ) from error


def _group_ids(file: pq.ParquetFile, group: int) -> list[str]:
    ids: list[str] = file.read_row_group(group, columns=["image_id"], use_threads=False)["image_id"].to_pylist()
    return ids


def read_unreadable(path: Path) -> dict[str, str]:
    """Return the images of a shard without a map, with the error of reading each."""
    reasons: dict[str, str] = json.loads(pq.read_metadata(path).metadata[_UNREADABLE.encode()])
    return reasons


def _to_row(prob_map: ProbabilityMap) -> MapRow:
    height, width = prob_map.probs_u8.shape
    return {
        "image_id": prob_map.image_id,
        "view": prob_map.view,
        "count": prob_map.count,
        "top": prob_map.top,
        "left": prob_map.left,
        "height": height,
        "width": width,
        "levels": ZSTD.compress(prob_map.probs_u8.tobytes(), asbytes=True),
    }


PredictionStream = Iterator[tuple[str, Sequence[ProbabilityMap] | CorruptFileError]]
"""Image ids in order, with the maps of their views (or of the views' sum), or with the error of reading the image."""


@dataclass(frozen=True)
class PredictJob:
    """Images to predict, and how their maps are stored."""

    image_ids: Sequence[str]
    views: Sequence[str]
    shard_images: int
    test: bool
    """Maps are sums of the views, and unreadable images are noted. If false, each view has a map, and an unreadable
    image is an error."""

    net: str
    """Digest of the net that predicts."""


def write_predictions(
    job: PredictJob,
    predict: Callable[[Sequence[str]], PredictionStream],
    work: Path,
    read_timing: Callable[[], WarmupAndRest] | None = None,
) -> Path:
    """Write the probability maps of all images and return their folder, below ``work``.

    ``read_timing`` returns the times since it was last called, after each shard; without it, none are stored.
    """
    folder, times = work / "maps", work / "times"
    folder.mkdir(exist_ok=True)
    shards = [job.image_ids[i : i + job.shard_images] for i in range(0, len(job.image_ids), job.shard_images)]
    missing = [number for number in range(len(shards)) if not (folder / shard_name(number)).is_file()]
    with tqdm(total=len(job.image_ids), desc="Predicting", unit="image") as bar:
        bar.update(len(job.image_ids) - sum(len(shards[number]) for number in missing))
        # One stream, so that a GPU does not wait at the end of each shard.
        stream = _counted(predict([image_id for number in missing for image_id in shards[number]]), bar)
        for number in missing:
            path = folder / shard_name(number)
            with atomic_write(path) as temporary:
                _write_shard(job, itertools.islice(stream, len(shards[number])), temporary)
                # Before the shard gets its name, so that no kill leaves a shard without its times.
                if read_timing:
                    write_warmup_and_rest(_times_of(path, times), read_timing())
    paths = [folder / shard_name(number) for number in range(len(shards))]
    write_index(
        folder,
        job.image_ids,
        job.views,
        merged=job.test,
        shard_images=job.shard_images,
        unreadable={image_id: reason for path in paths for image_id, reason in read_unreadable(path).items()},
        digests=[sha256_of_file(path) for path in paths],
        net=job.net,
    )
    records = [read_warmup_and_rest(_times_of(path, times)) for path in paths]
    write_timing(folder / TIMING_FILE, total_timing([pair for pair in records if pair]))
    return folder


def _times_of(shard: Path, times: Path) -> Path:
    return times / f"{shard.stem}.json"


def _write_shard(job: PredictJob, predictions: PredictionStream, path: Path) -> None:
    unreadable: dict[str, str] = {}
    with ShardWriter(path) as writer:
        for image_id, maps in predictions:
            if isinstance(maps, CorruptFileError):
                if not job.test:
                    raise maps
                unreadable[image_id] = str(maps)
            else:
                for prob_map in maps:
                    writer.add(prob_map)
        writer.note_unreadable(unreadable)


def _counted(predictions: PredictionStream, bar: "tqdm[Any]") -> PredictionStream:
    for prediction in predictions:
        yield prediction
        bar.update()
