"""Segment many images: read ahead in threads, predict in batches, write results in order."""

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from pipeline.config import ENSEMBLE_NAME, PARAMS_FILE, EnsembleSettings, Params, read_params
from pipeline.errors import CarvanaError, CorruptFileError
from pipeline.segment import segmenter
from pipeline.segment.image_loader import DEFAULT_LIMITS, ImageLimits, image_area, load_image
from pipeline.segment.outputs import MASK_FORMATS, RLE_CSV, SegmentJob, check_conflicts, plan_outputs, rle_row
from pipeline.segment.segmenter import ModelInputs, RawPredictions, Segmenter
from pipeline.submission.csv_file import CSV_HEADER
from pipeline.utils.files import atomic_write
from pipeline.utils.parallel import available_cpus

MAX_IN_FLIGHT_BYTES = 256 << 20
"""Bytes of images and probability maps that each of the three stages may hold; a larger image is processed alone."""

_MIN_ITEM_BYTES = MAX_IN_FLIGHT_BYTES // 64
"""Smallest size that an item counts with, so that at most 64 are in flight."""

_BYTES_PER_PIXEL = 3
"""Bytes per pixel of an RGB image; each net and view adds one more."""

Item = TypeVar("Item")
Done = TypeVar("Done")
ReadResult = tuple[SegmentJob, ModelInputs | CorruptFileError]
PredictedResult = tuple[SegmentJob, RawPredictions | CorruptFileError]


def predict_images(
    segmenter: Segmenter,
    jobs: Sequence[SegmentJob],
    finish: Callable[[SegmentJob, RawPredictions], Done],
    batch_size: int,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> Generator[tuple[SegmentJob, Done | CorruptFileError]]:
    """Yield every job in order, with the result of ``finish`` or with the error if its image cannot be read.

    Several threads read and resize images, one runs the nets in batches, and several run ``finish``.
    """

    def read(job: SegmentJob) -> ReadResult:
        try:
            image_HWC = load_image(job.path, str(job.path), limits)
        except CorruptFileError as error:
            return job, error
        except OSError as error:  # such as a dangling link or missing permission; the other images are still processed
            return job, CorruptFileError(f"{job.path}: cannot be read ({error.strerror or error}).")
        return job, segmenter.prepare(image_HWC)

    def predict(batch: list[ReadResult]) -> list[PredictedResult]:
        inputs = [item for _, item in batch if isinstance(item, ModelInputs)]
        predictions = iter(segmenter.predict_batch(inputs))
        return [(job, item if isinstance(item, CorruptFileError) else next(predictions)) for job, item in batch]

    def finish_item(item: PredictedResult) -> tuple[SegmentJob, Done | CorruptFileError]:
        job, predictions = item
        return job, predictions if isinstance(predictions, CorruptFileError) else finish(job, predictions)

    def size(item: ReadResult | PredictedResult) -> int:
        if isinstance(item[1], CorruptFileError):
            return 0
        return math.prod(item[1].size) * (_BYTES_PER_PIXEL + segmenter.maps_per_image)

    readers, predictor, finishers = (
        ThreadPoolExecutor(available_cpus()),
        ThreadPoolExecutor(1),
        ThreadPoolExecutor(available_cpus()),
    )
    try:
        images = bounded_map(readers, read, jobs, lambda job: image_area(job.path, limits) * _BYTES_PER_PIXEL)
        batches = bounded_map(
            predictor, predict, _batches(images, batch_size, size), lambda batch: sum(map(size, batch))
        )
        yield from bounded_map(finishers, finish_item, chain.from_iterable(batches), size)
    finally:
        for pool in (readers, predictor, finishers):
            pool.shutdown(cancel_futures=True)


def bounded_map(
    pool: ThreadPoolExecutor, call: Callable[[Item], Done], items: Iterable[Item], size: Callable[[Item], int]
) -> Iterator[Done]:
    """Yield ``call(item)`` for each item, in order, while the pool works ahead.

    The items in flight are at most ``MAX_IN_FLIGHT_BYTES`` by their ``size``; a larger item is processed alone.
    """
    waiting: deque[tuple[int, Future[Done]]] = deque()
    held = 0
    for item in items:
        needed = max(size(item), _MIN_ITEM_BYTES)
        while waiting and (held + needed > MAX_IN_FLIGHT_BYTES or waiting[0][1].done()):
            freed, future = waiting.popleft()
            held -= freed
            yield future.result()
        waiting.append((needed, pool.submit(call, item)))
        held += needed
    while waiting:
        yield waiting.popleft()[1].result()


def _batches(
    images: Iterable[ReadResult], batch_size: int, size: Callable[[ReadResult], int]
) -> Iterator[list[ReadResult]]:
    """Yield batches of up to ``batch_size`` images, fewer if they are large, so that two batches fit in memory."""
    batch: list[ReadResult] = []
    for image in images:
        if batch and (len(batch) == batch_size or sum(map(size, [*batch, image])) > MAX_IN_FLIGHT_BYTES // 2):
            yield batch
            batch = []
        batch.append(image)
    if batch:
        yield batch


RLE = "rle"
"""Output format besides ``MASK_FORMATS``: one CSV for all images."""

_DEFAULT_BATCH = 4
"""Batch size outside a project."""


@dataclass
class RunSummary:
    """Counts for the final message."""

    pixels: list[int] = field(default_factory=list)
    """Of each segmented image."""
    skipped: list[str] = field(default_factory=list)
    """The error of each image that could not be read."""
    seconds: float = 0.0


def segment_images(
    paths: Sequence[Path],
    out: Path,
    *,
    names: Sequence[str] = (ENSEMBLE_NAME,),
    views: Sequence[str] | None = None,
    changes: Mapping[str, Any] | None = None,
    write: Collection[str] = ("mask",),
    overwrite: bool = False,
) -> None:
    """Segment images with the nets ``names`` and write the results to ``out``.

    Settings are those of params.yaml, or the defaults if there is none; ``changes`` override its ``ensemble`` section.
    ``write``: names of ``MASK_FORMATS``, and ``rle``. Raises CarvanaError before any work if the arguments are invalid
    or files would be overwritten, and at the end if any image could not be read.
    """
    jobs, kinds, csv = (
        plan_outputs(paths, out),
        [kind for kind in MASK_FORMATS if kind in write],
        out / RLE_CSV if RLE in write else None,
    )
    check_conflicts(jobs, kinds, csv, overwrite=overwrite)
    params = read_params() if Path(PARAMS_FILE).exists() else None
    nets = _build_segmenter(names, views, params)
    settings = _settings(params, nets, changes or {})
    print(f"Predicting with {', '.join(nets.nets)}.", file=sys.stderr)

    def finish(job: SegmentJob, predictions: RawPredictions) -> tuple[int, str]:
        mask_HW = nets.segment(predictions, settings)
        for kind in kinds:
            with atomic_write(job.target(kind)) as temporary:
                temporary.write_bytes(MASK_FORMATS[kind].encode(predictions.image_HWC, mask_HW))
        return mask_HW.size, rle_row(job.path.name, mask_HW) if csv else ""

    summary = _collect(
        predict_images(nets, jobs, finish, params.hardware.predict_batch if params else _DEFAULT_BATCH), len(jobs), csv
    )
    print(_format_summary(summary, [*kinds, *([csv.name] if csv else [])], out))
    if summary.skipped:
        raise CarvanaError(f"{len(summary.skipped)} of {len(jobs)} images were skipped. First: {summary.skipped[0]}")


def _build_segmenter(names: Sequence[str], views: Sequence[str] | None, params: Params | None) -> Segmenter:
    found = dict.fromkeys(net for name in names for net in _expand(name, params))
    if params is None:
        return Segmenter({net: segmenter.load_predictor(net, views or ["identity"]) for net in found})
    views, device = views or params.predict.tta.test, params.hardware.device
    weights, precision = params.predict.checkpoint, params.predict.precision
    return Segmenter(
        {
            net: segmenter.load_predictor(net, views, weights=weights, device=device, precision=precision)
            for net in found
        }
    )


def _settings(params: Params | None, nets: Segmenter, changes: Mapping[str, Any]) -> EnsembleSettings:
    defaults = params.ensemble.model_dump() if params else {}
    threshold = segmenter.default_threshold(nets.nets.values())
    if threshold is not None:
        defaults["threshold"] = threshold
    return EnsembleSettings.model_validate({**defaults, **changes})


def _expand(name: str, params: Params | None) -> list[str]:
    if name != ENSEMBLE_NAME:
        return segmenter.resolve(name)
    if params is None:
        raise CarvanaError(
            f"'{ENSEMBLE_NAME}' needs {PARAMS_FILE}, which was not found. Change to the project folder, or use --net."
        )
    return [f"{model}/{fold}" for model, fold in params.ensemble_members()]


def _collect(
    results: Generator[tuple[SegmentJob, tuple[int, str] | CorruptFileError]], count: int, csv: Path | None
) -> RunSummary:
    """Consume all results with a progress bar; write their rows to the CSV, if any."""
    summary, start = RunSummary(), time.perf_counter()
    bar = tqdm(total=count, desc="Predicting", unit="image", disable=None)
    with bar, _rows(csv) as rows, closing(results):
        try:
            for _, result in results:
                if isinstance(result, CorruptFileError):
                    summary.skipped.append(str(result))
                    bar.write(f"skipped: {result}", file=sys.stderr)
                else:
                    summary.pixels.append(result[0])
                    rows.write(result[1])
                bar.update()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"Stopped after {len(summary.pixels)} of {count} images. The files written so far are complete. "
                "To start over, add --overwrite."
            ) from None
    summary.seconds = time.perf_counter() - start
    return summary


@contextmanager
def _rows(csv: Path | None) -> Iterator[TextIO]:
    """Yield a file for the CSV's rows, written atomically; without ``csv`` rows are discarded."""
    with (
        atomic_write(csv) if csv else nullcontext(Path(os.devnull)) as path,
        path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        file.write(f"{CSV_HEADER}\n")
        yield file


def _format_summary(summary: RunSummary, written: Sequence[str], out: Path) -> str:
    count, megapixels = len(summary.pixels), sum(summary.pixels) / 1e6
    if not count:
        return "No image could be read."
    return (
        f"{count} image{'s' * (count != 1)} ({megapixels / count:.1f} megapixels on average) "
        f"in {summary.seconds:.1f} s, {count / summary.seconds:.2f} images/s. Wrote {', '.join(written)} to {out}."
    )
