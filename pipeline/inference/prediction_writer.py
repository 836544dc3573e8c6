"""Predict the images of one split with one net, shard by shard; a killed run resumes after its last shard."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
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
from pipeline.inference.probability_map import ProbabilityMap, sum_views
from pipeline.utils.files import atomic_write

PredictionStream = Iterator[tuple[str, NDArray[np.uint8] | CorruptFileError]]
"""Image ids in order, with probabilities, uint8 (V, 1280, 1918), or with the error of reading the image."""


@dataclass(frozen=True)
class PredictJob:
    """Images to predict, and how their maps are stored."""

    image_ids: Sequence[str]
    views: Sequence[str]
    shard_images: int
    test: bool
    """Sum the views and note unreadable images. If false, store each view; an unreadable image is an error."""

    net: str
    """Digest of the net that predicts."""


def write_predictions(
    job: PredictJob,
    predict: Callable[[Sequence[str]], PredictionStream],
    work: Path,
    read_timing: Callable[[], WarmupAndRest] | None = None,
) -> Path:
    """Write the probability maps of all images and return their folder, below ``work``.

    ``read_timing`` returns the times of the shard that was just predicted; without it, none are stored.
    """
    folder, times = work / "maps", work / "times"
    folder.mkdir(exist_ok=True)
    shards = [job.image_ids[i : i + job.shard_images] for i in range(0, len(job.image_ids), job.shard_images)]
    with tqdm(total=len(job.image_ids), desc="Predicting", unit="image") as bar:
        for number, image_ids in enumerate(shards):
            path = folder / shard_name(number)
            if not path.is_file():
                with atomic_write(path) as temporary:
                    _write_shard(job, _counted(predict(image_ids), bar), temporary)
                    # Before the shard gets its name, so that no kill leaves a shard without its times.
                    if read_timing:
                        write_warmup_and_rest(_times_of(path, times), read_timing())
            bar.update(min((number + 1) * job.shard_images, len(job.image_ids)) - bar.n)
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
        for image_id, probs_VHW in predictions:
            if isinstance(probs_VHW, CorruptFileError):
                if not job.test:
                    raise probs_VHW
                unreadable[image_id] = str(probs_VHW)
            elif job.test:
                writer.add(sum_views(image_id, "+".join(job.views), probs_VHW))
            else:
                for view, probs_HW in zip(job.views, probs_VHW, strict=True):
                    writer.add(ProbabilityMap.crop(image_id, view, 1, probs_HW))
        writer.note_unreadable(unreadable)


def _counted(predictions: PredictionStream, bar: "tqdm[Any]") -> PredictionStream:
    for prediction in predictions:
        yield prediction
        bar.update()


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
