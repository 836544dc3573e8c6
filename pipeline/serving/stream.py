"""Many pictures through some nets, in memory that does not grow with their number."""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import TypeVar

from pipeline.cores import available_cpus
from pipeline.errors import CorruptFileError
from pipeline.serving.jobs import SegmentJob
from pipeline.serving.masker import ModelInputs, RawPredictions, Segmenter
from pipeline.serving.pictures import DEFAULT_LIMITS, ImageLimits, image_area, load_image

MAX_IN_FLIGHT_BYTES = 256 << 20
"""Of pictures, and of what nets say of them, that each of the three stages below may hold; a larger one goes alone."""

_LEAST = MAX_IN_FLIGHT_BYTES // 64
"""What a small picture counts for, so that there are no more than 64 of them."""

_COLOURS = 3
"""Bytes of a pixel of a picture; each net and view adds one."""

Item = TypeVar("Item")
Done = TypeVar("Done")
ReadResult = tuple[SegmentJob, ModelInputs | CorruptFileError]
PredictedResult = tuple[SegmentJob, RawPredictions | CorruptFileError]


def predict_images(
    masker: Segmenter,
    jobs: Sequence[SegmentJob],
    finish: Callable[[SegmentJob, RawPredictions], Done],
    batch_size: int,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> Generator[tuple[SegmentJob, Done | CorruptFileError]]:
    """Yield every picture in order with what ``finish`` makes of it, or with why it can't be read.

    Some threads read and shrink, one runs the nets, a batch of pictures of any sizes a pass, and some finish.
    """

    def read(job: SegmentJob) -> ReadResult:
        try:
            image_HWC = load_image(job.path, str(job.path), limits)
        except CorruptFileError as error:
            return job, error
        except OSError as error:  # a link to nothing, no right to read it: the other pictures can still be had
            return job, CorruptFileError(f"{job.path} can't be read ({error.strerror or error}).")
        return job, masker.prepare(image_HWC)

    def look(batch: list[ReadResult]) -> list[PredictedResult]:
        looked = iter(masker.predict_image([picture for _, picture in batch if isinstance(picture, ModelInputs)]))
        return [(job, p if isinstance(p, CorruptFileError) else next(looked)) for job, p in batch]

    def close(seen: PredictedResult) -> tuple[SegmentJob, Done | CorruptFileError]:
        job, looked = seen
        return job, looked if isinstance(looked, CorruptFileError) else finish(job, looked)

    def size(item: ReadResult | PredictedResult) -> int:
        return 0 if isinstance(item[1], CorruptFileError) else math.prod(item[1].size) * (_COLOURS + masker.rasters)

    readers, net, closers = (
        ThreadPoolExecutor(available_cpus()),
        ThreadPoolExecutor(1),
        ThreadPoolExecutor(available_cpus()),
    )
    try:
        pictures = bounded_map(readers, read, jobs, lambda job: image_area(job.path, limits) * _COLOURS)
        batches = bounded_map(net, look, _batches(pictures, batch_size, size), lambda batch: sum(map(size, batch)))
        yield from bounded_map(closers, close, chain.from_iterable(batches), size)
    finally:
        for pool in (readers, net, closers):
            pool.shutdown(cancel_futures=True)


def bounded_map(
    pool: ThreadPoolExecutor, call: Callable[[Item], Done], items: Iterable[Item], size: Callable[[Item], int]
) -> Iterator[Done]:
    """Yield what a call makes of each item, in order, while the pool is at the next ones.

    Those under way have no more than ``BYTES_UNDER_WAY`` together, unless a single one has.
    """
    waiting: deque[tuple[int, Future[Done]]] = deque()
    held = 0
    for item in items:
        needed = max(size(item), _LEAST)
        while waiting and (held + needed > MAX_IN_FLIGHT_BYTES or waiting[0][1].done()):
            freed, future = waiting.popleft()
            held -= freed
            yield future.result()
        waiting.append((needed, pool.submit(call, item)))
        held += needed
    while waiting:
        yield waiting.popleft()[1].result()


def _batches(
    pictures: Iterable[ReadResult], most: int, size: Callable[[ReadResult], int]
) -> Iterator[list[ReadResult]]:
    """Yield pictures in order, up to ``most`` together, fewer where they are large: two batches may be under way."""
    batch: list[ReadResult] = []
    for picture in pictures:
        if batch and (len(batch) == most or sum(map(size, [*batch, picture])) > MAX_IN_FLIGHT_BYTES // 2):
            yield batch
            batch = []
        batch.append(picture)
    if batch:
        yield batch
