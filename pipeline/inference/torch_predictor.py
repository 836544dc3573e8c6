"""A trained net at work: one picture at a time, or a stream of them."""

import copy
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Self

import numpy as np
import torch

from pipeline.config import Device, Precision
from pipeline.errors import CarvanaError, CorruptFileError
from pipeline.inference.base_predictor import BasePredictor
from pipeline.models.networks import load_model
from pipeline.models.tensors import (
    memory_format,
    quantize_logits_tensor,
    resolve_device,
    resolve_precision,
    to_batch,
    upsample_logits_tensor,
)
from pipeline.models.tta import TTATransform
from pipeline.utils.arrays import UInt8Array


@dataclass
class TimingRecord:
    """Images that were predicted, the wall's seconds for them with all their views, and the device's for each view."""

    images: int = 0
    seconds: float = 0.0
    views: dict[str, float] = field(default_factory=dict)


class DeviceSpans:
    """Stretches of one batch's work on a device, by view.

    A GPU notes their borders itself, when it gets there, so that nobody waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._moments: list[tuple[str, float, float]] = []
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def span(self, view: str) -> Iterator[None]:
        """Count what the block gives the device to do as the view's; several blocks of a view add up."""
        if self._device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            yield
            end.record()
            self._events.append((view, start, end))
        else:
            begun = self._now()
            yield
            self._moments.append((view, begun, self._now()))

    def seconds(self) -> list[tuple[str, float]]:
        """Return view and seconds of each block; to be asked only once the device has done them all."""
        milliseconds = [(view, start.elapsed_time(end)) for view, start, end in self._events]
        return [(view, t / 1000) for view, t in milliseconds] + [(view, b - a) for view, a, b in self._moments]

    def _now(self) -> float:
        if self._device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()


class PredictionTimer:
    """Measures streams of batches, which may come from several threads, one stream after the other.

    The first batch it ever sees is a lap of its own: it warms up memory, algorithms and the pipeline.
    """

    def __init__(self, views: Sequence[str]) -> None:
        self._views = list(views)
        self._lock = Lock()
        self._warm = False
        self.start()

    def start(self) -> None:
        """Begin a stream; what was measured of the one before is forgotten."""
        with self._lock:
            self._first, self._later = (TimingRecord(views=dict.fromkeys(self._views, 0.0)) for _ in range(2))
            self._since = time.perf_counter()

    def add_batch(self, images: int, spans: DeviceSpans) -> None:
        """Count a batch that the device has done."""
        with self._lock:
            lap = self._later if self._warm else self._first
            lap.images += images
            for view, seconds in spans.seconds():
                lap.views[view] += seconds
            if not self._warm:
                self._warm = True
                self._count_to(lap)

    def stop(self) -> None:
        """End a stream, when all of it was taken."""
        with self._lock:
            self._count_to(self._later if self._later.images else self._first)

    def warmup_and_rest(self) -> tuple[TimingRecord, TimingRecord]:
        """Return what the stream's warming batch took, no images where it had none, and what the others took."""
        return self._first, self._later

    def _count_to(self, lap: TimingRecord) -> None:
        now = time.perf_counter()
        lap.seconds += now - self._since
        self._since = now


class TorchPredictor(BasePredictor):
    """A trained net's folder, loaded once, that turns pictures into probabilities.

    Needs neither Lightning nor the settings of training. Raises CarvanaError if the folder holds no net that fits.
    """

    def __init__(
        self,
        folder: Path,
        *,
        views: Sequence[str] = ("identity",),
        weights: str = "last",
        device: Device = "auto",
        precision: Precision = "auto",
    ) -> None:
        self.folder = folder
        self.views = list(views)
        self._views = [TTATransform.parse(name) for name in views]
        self.timer = PredictionTimer(views)
        self.device = resolve_device(device)
        self.dtype = resolve_precision(precision, self.device)
        net, self.input = load_model(folder, weights)
        self.net = net.to(self.device).to(memory_format=memory_format(self.device))
        self._turn = Lock()
        self._batches = itertools.count()

    def with_tta(self, views: Sequence[str]) -> Self:
        """Return the same net, with which it shares its weights but no stopwatch, that looks at other views."""
        other = copy.copy(self)
        other.views = list(views)
        other._views = [TTATransform.parse(name) for name in views]
        other.timer = PredictionTimer(views)
        return other

    def predict_u8(self, inputs: list[UInt8Array], height: int, width: int) -> UInt8Array:
        """Return what ``Speaker.levels`` does, and tell the stopwatch how long it took."""
        shape = (len(inputs), len(self.views), height, width)
        levels_BVHW = torch.empty(shape, dtype=torch.uint8, device=self.device)
        spans = self._forward_views(inputs, list(levels_BVHW))
        levels = np.asarray(levels_BVHW.cpu())
        self.timer.add_batch(len(inputs), spans)
        return levels

    def predict_u8_at_sizes(self, inputs: list[UInt8Array], sizes: Sequence[tuple[int, int]]) -> list[UInt8Array]:
        """Return what ``Speaker.levels_at`` does, and tell the stopwatch how long it took."""
        levels = [torch.empty((len(self.views), *size), dtype=torch.uint8, device=self.device) for size in sizes]
        spans = self._forward_views(inputs, levels)
        rasters = [np.asarray(levels_VHW.cpu()) for levels_VHW in levels]
        self.timer.add_batch(len(inputs), spans)
        return rasters

    @torch.inference_mode()
    def _forward_views(self, inputs: list[UInt8Array], levels: Sequence[torch.Tensor]) -> DeviceSpans:
        """Fill the ``levels`` (V, height, width) of each prepared picture."""
        pixels_BCHW = to_batch(inputs, self.device).float()
        spans = DeviceSpans(self.device)
        for index in self._view_order():
            name, view = self.views[index], self._views[index]
            # In turn: a GPU does what it is given in that order, so that no span holds what another batch gave it.
            with self._turn, spans.span(name):
                logits_B1HW = self._logits(view, pixels_BCHW)
                finite = torch.isfinite(logits_B1HW).all()
            self._check_finite(finite)
            with self._turn, spans.span(name):
                # One by one: on a CPU, a raster of floats that is used again and again stays in the cache.
                for number, levels_VHW in enumerate(levels):
                    height, width = levels_VHW.shape[1:]
                    levels_VHW[index] = quantize_logits_tensor(
                        upsample_logits_tensor(logits_B1HW[number : number + 1], height, width)
                    )[0]
        return spans

    def _view_order(self) -> list[int]:
        """Return the views, another first each time: the first of a batch pays what all share, and time is taken."""
        first = next(self._batches)
        return [(first + index) % len(self.views) for index in range(len(self.views))]

    def _logits(self, view: TTATransform, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return view.deaugment(self.net(view.augment(pixels_BCHW)))

    def _check_finite(self, finite: torch.Tensor) -> None:
        if not finite:
            raise CarvanaError(
                f"The net of {self.folder} gives no finite numbers in {self.dtype}: set predict.precision to 32, "
                "or train it again with a lower train.lr."
            )


def predict_stream(
    predictor: TorchPredictor,
    image_ids: Sequence[str],
    read: Callable[[str], UInt8Array],
    size: tuple[int, int],
    batch_size: int,
    threads: int,
) -> Iterator[tuple[str, UInt8Array | CorruptFileError]]:
    """Yield every image id in order with its levels (V, *size), or with why it can't be read.

    While the net works, ``threads`` read and shrink images for it, and the caller sees to the batch before; at most a
    few batches wait in memory. What a stream that was taken to its end took, the predictor's stopwatch tells.
    """

    def prepared(image_id: str) -> UInt8Array | CorruptFileError:
        try:
            return predictor.preprocess(read(image_id))
        except CorruptFileError as error:
            return error

    def predicted(batch: list[PreparedImage]) -> list[tuple[str, UInt8Array | CorruptFileError]]:
        sound = [pixels for _, pixels in batch if not isinstance(pixels, CorruptFileError)]
        levels = iter(predictor.predict_u8(sound, *size) if sound else ())
        return [(image_id, p if isinstance(p, CorruptFileError) else next(levels)) for image_id, p in batch]

    predictor.timer.start()
    # A GPU is kept busy by two: one uploads its batch while the other's is computed.
    at_once = 2 if predictor.device.type == "cuda" else 1
    with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(at_once) as net:
        running: deque[Future[list[tuple[str, UInt8Array | CorruptFileError]]]] = deque()
        for batch in _ahead(readers, prepared, image_ids, batch_size):
            running.append(net.submit(predicted, batch))
            if len(running) > at_once:
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()
    predictor.timer.stop()


PreparedImage = tuple[str, UInt8Array | CorruptFileError]


def _ahead(
    pool: ThreadPoolExecutor,
    prepare: Callable[[str], UInt8Array | CorruptFileError],
    image_ids: Sequence[str],
    batch_size: int,
) -> Iterator[list[PreparedImage]]:
    """Yield batches in order, with two more being prepared meanwhile."""
    waiting: deque[list[tuple[str, Future[UInt8Array | CorruptFileError]]]] = deque()
    for start in range(0, len(image_ids), batch_size):
        batch = image_ids[start : start + batch_size]
        waiting.append([(image_id, pool.submit(prepare, image_id)) for image_id in batch])
        if len(waiting) > 2:
            yield [(image_id, future.result()) for image_id, future in waiting.popleft()]
    while waiting:
        yield [(image_id, future.result()) for image_id, future in waiting.popleft()]
