"""Predict the images of one split with one net, shard by shard; a killed run resumes after its last shard."""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.errors import CorruptFileError
from pipeline.inference.prediction_store import (
    TIMING_FILE,
    ShardWriter,
    WarmupAndRest,
    read_unreadable,
    read_warmup_and_rest,
    shard_name,
    total_timing,
    write_index,
    write_timing,
    write_warmup_and_rest,
)
from pipeline.inference.probability_map import ProbabilityMap
from pipeline.utils.files import atomic_write

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
        digests=[_sha256(path) for path in paths],
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


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
