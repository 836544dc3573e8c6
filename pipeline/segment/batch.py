"""Segment many images: read ahead, predict in batches, write in order."""

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


RLE = "rle"
"""What is written besides ``KINDS``: one CSV for all pictures."""

_BATCH = 4
"""Pictures a forward pass where there are no settings."""


@dataclass
class RunTally:
    """What became of the pictures."""

    pixels: list[int] = field(default_factory=list)
    """Of each that was sound."""
    skipped: list[str] = field(default_factory=list)
    """Why, of each that was not."""
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
    """Write what the nets of some ``names`` make of each picture, by params.yaml with some ``changes`` of `ensemble`.

    Where there is no params.yaml, defaults hold. Raises CarvanaError before any work if it can't be done, and at the
    end if a picture was not sound.
    """
    jobs, kinds, csv = (
        plan_outputs(paths, out),
        [kind for kind in MASK_FORMATS if kind in write],
        out / RLE_CSV if RLE in write else None,
    )
    check_conflicts(jobs, kinds, csv, overwrite=overwrite)
    params = read_params() if Path(PARAMS_FILE).exists() else None
    masker = _segmenter(names, views, params)
    settings = _settings(params, masker, changes or {})
    print(f"Predicting with {', '.join(masker.nets)}.", file=sys.stderr)

    def finish(job: SegmentJob, looked: RawPredictions) -> tuple[int, str]:
        mask_HW = masker.segment(looked, settings)
        for kind in kinds:
            with atomic_write(job.target(kind)) as temporary:
                temporary.write_bytes(MASK_FORMATS[kind].encode(looked.image_HWC, mask_HW))
        return mask_HW.size, rle_row(job.path.name, mask_HW) if csv else ""

    tally = _work(
        predict_images(masker, jobs, finish, params.hardware.predict_batch if params else _BATCH), len(jobs), csv
    )
    print(_summary(tally, [*kinds, *([csv.name] if csv else [])], out))
    if tally.skipped:
        raise CarvanaError(f"{len(tally.skipped)} of {len(jobs)} pictures were skipped, first: {tally.skipped[0]}")


def _segmenter(names: Sequence[str], views: Sequence[str] | None, params: Params | None) -> Segmenter:
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


def _settings(params: Params | None, masker: Segmenter, changes: Mapping[str, Any]) -> EnsembleSettings:
    tree = params.ensemble.model_dump() if params else {}
    own = segmenter.default_threshold(masker.nets.values())
    return EnsembleSettings.model_validate({**tree, **({} if own is None else {"threshold": own}), **changes})


def _expand(name: str, params: Params | None) -> list[str]:
    if name != ENSEMBLE_NAME:
        return segmenter.resolve(name)
    if params is None:
        raise CarvanaError(
            f"The ensemble is that of {PARAMS_FILE}, which is not here: go to the project, or give --net."
        )
    return [f"{model}/{fold}" for model, fold in params.ensemble_members()]


def _work(
    results: Generator[tuple[SegmentJob, tuple[int, str] | CorruptFileError]], count: int, csv: Path | None
) -> RunTally:
    """Take all results, showing how far it is; the CSV, if any, appears when all are there."""
    tally, begun = RunTally(), time.perf_counter()
    bar = tqdm(total=count, desc="Predicting", unit="picture", disable=None)
    with bar, _rows(csv) as rows, closing(results):
        try:
            for _, result in results:
                if isinstance(result, CorruptFileError):
                    tally.skipped.append(str(result))
                    bar.write(f"skipped: {result}", file=sys.stderr)
                else:
                    tally.pixels.append(result[0])
                    rows.write(result[1])
                bar.update()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"Stopped after {len(tally.pixels)} of {count} pictures. What is written is whole; "
                "with --overwrite the same command begins again."
            ) from None
    tally.seconds = time.perf_counter() - begun
    return tally


@contextmanager
def _rows(csv: Path | None) -> Iterator[TextIO]:
    """Yield where rows go: to the file, which appears whole or not at all, or nowhere."""
    with (
        atomic_write(csv) if csv else nullcontext(Path(os.devnull)) as path,
        path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        file.write(f"{CSV_HEADER}\n")
        yield file


def _summary(tally: RunTally, written: Sequence[str], out: Path) -> str:
    count, megapixels = len(tally.pixels), sum(tally.pixels) / 1e6
    if not count:
        return "No picture was sound."
    return (
        f"{count} picture{'s' * (count != 1)} of {megapixels / count:.1f} megapixels on average "
        f"in {tally.seconds:.1f} s, "
        f"{count / tally.seconds:.2f} a second: {', '.join(written)} in {out}."
    )
