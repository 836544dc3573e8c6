"""Run a trained net with torch: on batches, or on a stream of images."""

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from pipeline.models.networks import UNet, dry_run_error, load_model
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
from pipeline.utils.parallel import ordered_map


@dataclass
class TimingRecord:
    """Number of images, wall-clock seconds for all their views, and device seconds per view."""

    images: int = 0
    seconds: float = 0.0
    views: dict[str, float] = field(default_factory=dict)


class DeviceSpans:
    """Device time of one batch, by view.

    A GPU records the events itself, so that no thread waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu_times: list[tuple[str, float, float]] = []
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def span(self, view: str) -> Iterator[None]:
        """Count the work that the block gives the device for a view; several blocks of a view add up."""
        if self._device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            yield
            end.record()
            self._events.append((view, start, end))
        else:
            started = self._now()
            yield
            self._cpu_times.append((view, started, self._now()))

    def seconds(self) -> list[tuple[str, float]]:
        """Return view and seconds of each block; call it once the device has finished them all."""
        milliseconds = [(view, start.elapsed_time(end)) for view, start, end in self._events]
        return [(view, t / 1000) for view, t in milliseconds] + [(view, b - a) for view, a, b in self._cpu_times]

    def _now(self) -> float:
        if self._device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()


class PredictionTimer:
    """Measures streams of batches, one stream after the other; batches may come from several threads.

    The very first batch is recorded apart: it warms up memory, algorithms and the pipeline.
    """

    def __init__(self, views: Sequence[str]) -> None:
        self._views = list(views)
        self._lock = Lock()
        self._warm = False
        self.start()

    def start(self) -> None:
        """Begin a stream; the measurements of the one before are dropped."""
        with self._lock:
            self._warmup, self._rest = (TimingRecord(views=dict.fromkeys(self._views, 0.0)) for _ in range(2))
            self._since = time.perf_counter()

    def add_batch(self, images: int, spans: DeviceSpans) -> None:
        """Add a batch that the device has finished."""
        with self._lock:
            record = self._rest if self._warm else self._warmup
            record.images += images
            for view, seconds in spans.seconds():
                record.views[view] += seconds
            if not self._warm:
                self._warm = True
                self._add_elapsed(record)

    def stop(self) -> None:
        """End a stream, when all of it was consumed."""
        with self._lock:
            self._add_elapsed(self._rest if self._rest.images else self._warmup)

    def warmup_and_rest(self) -> tuple[TimingRecord, TimingRecord]:
        """Return the records of the warm-up batch (no images if the stream had none) and of the other batches."""
        return self._warmup, self._rest

    def _add_elapsed(self, record: TimingRecord) -> None:
        now = time.perf_counter()
        record.seconds += now - self._since
        self._since = now


class TorchPredictor(BasePredictor):
    """A trained net, loaded from its folder.

    Needs neither Lightning nor the training settings. Raises CarvanaError if the folder has no valid net.
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
        self._check_views()

    def with_tta(self, views: Sequence[str]) -> Self:
        """Return the same net, sharing its weights but not its timer, with other views."""
        other = copy.copy(self)
        other.views = list(views)
        other._views = [TTATransform.parse(name) for name in views]
        other.timer = PredictionTimer(views)
        other._check_views()
        return other

    def _check_views(self) -> None:
        """Raise CarvanaError for a view at a size that the encoder does not accept."""
        if isinstance(self.net.network, UNet):  # takes any size
            return
        shapes = copy.deepcopy(self.net).to("meta")
        for name, view in zip(self.views, self._views, strict=True):
            size = view.size(self.input.height, self.input.width)
            error = dry_run_error(self.net, shapes, (1, self.input.channel_count, *size))
            if error:
                raise CarvanaError(
                    f"The net of {self.folder} can't process view {name}, {size[0]} x {size[1]}: {error}. "
                    "Remove the view from predict.tta."
                )

    def predict_u8(self, inputs: list[UInt8Array], height: int, width: int) -> UInt8Array:
        """Return probabilities as ``BasePredictor.predict_u8`` says, and time them."""
        shape = (len(inputs), len(self.views), height, width)
        probs_BVHW = torch.empty(shape, dtype=torch.uint8, device=self.device)
        spans = self._forward_views(inputs, list(probs_BVHW))
        probs = np.asarray(probs_BVHW.cpu())
        self.timer.add_batch(len(inputs), spans)
        return probs

    def predict_u8_at_sizes(self, inputs: list[UInt8Array], sizes: Sequence[tuple[int, int]]) -> list[UInt8Array]:
        """Return probabilities as ``BasePredictor.predict_u8_at_sizes`` says, and time them."""
        probs = [torch.empty((len(self.views), *size), dtype=torch.uint8, device=self.device) for size in sizes]
        spans = self._forward_views(inputs, probs)
        arrays = [np.asarray(probs_VHW.cpu()) for probs_VHW in probs]
        self.timer.add_batch(len(inputs), spans)
        return arrays

    @torch.inference_mode()
    def _forward_views(self, inputs: list[UInt8Array], probs: Sequence[torch.Tensor]) -> DeviceSpans:
        """Fill the probabilities (V, height, width) of each input."""
        pixels_BCHW = to_batch(inputs, self.device).float()
        spans = DeviceSpans(self.device)
        for index in self._view_order():
            name, view = self.views[index], self._views[index]
            # In turn: a GPU works in the order of submission, so that no span contains work of another batch.
            with self._turn, spans.span(name):
                logits_B1HW = self._logits(view, pixels_BCHW)
                finite = torch.isfinite(logits_B1HW).all()
            self._check_finite(finite)
            with self._turn, spans.span(name):
                # One by one: on a CPU, a float array that is reused stays in the cache.
                for number, probs_VHW in enumerate(probs):
                    height, width = probs_VHW.shape[1:]
                    probs_VHW[index] = quantize_logits_tensor(
                        upsample_logits_tensor(logits_B1HW[number : number + 1], height, width)
                    )[0]
        return spans

    def _view_order(self) -> list[int]:
        """Return the order of views, another first each time, since the first of a batch also pays shared costs."""
        first = next(self._batches)
        return [(first + index) % len(self.views) for index in range(len(self.views))]

    def _logits(self, view: TTATransform, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return view.deaugment(self.net(view.augment(pixels_BCHW)))

    def _check_finite(self, finite: torch.Tensor) -> None:
        if not finite:
            raise CarvanaError(
                f"The output of {self.folder} is NaN or infinite in {self.dtype}. Set predict.precision to 32, "
                "or train again with a lower train.lr."
            )


def predict_stream(
    predictor: TorchPredictor,
    image_ids: Sequence[str],
    read: Callable[[str], UInt8Array],
    size: tuple[int, int],
    batch_size: int,
    threads: int,
) -> Iterator[tuple[str, UInt8Array | CorruptFileError]]:
    """Yield every image id in order with its probabilities, uint8 (V, *size), or with the error of reading it.

    While the net runs, ``threads`` read and shrink images, and the caller handles the previous batch; a few batches
    wait in memory at most. The predictor's timer has the times once the stream was consumed.
    """

    def prepare(image_id: str) -> PreparedImage:
        try:
            return image_id, predictor.preprocess(read(image_id))
        except CorruptFileError as error:
            return image_id, error

    def predict(batch: list[PreparedImage]) -> list[PreparedImage]:
        readable = [pixels for _, pixels in batch if not isinstance(pixels, CorruptFileError)]
        probs = iter(predictor.predict_u8(readable, *size) if readable else ())
        return [(image_id, p if isinstance(p, CorruptFileError) else next(probs)) for image_id, p in batch]

    predictor.timer.start()
    # Two threads keep a GPU busy: one uploads its batch while the other's is computed.
    net_threads = 2 if predictor.device.type == "cuda" else 1
    with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(net_threads) as net:
        prepared = ordered_map(readers, prepare, image_ids, ahead=2 * batch_size)
        batches = iter(lambda: list(itertools.islice(prepared, batch_size)), [])
        for batch in ordered_map(net, predict, batches, ahead=net_threads):
            yield from batch
    predictor.timer.stop()


PreparedImage = tuple[str, UInt8Array | CorruptFileError]
"""Image id with its array (the net's input or its probabilities), or with the error of reading the image."""
