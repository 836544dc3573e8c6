"""Run a trained net with torch: on batches, or on a stream of images."""

import copy
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config import Device, Precision
from pipeline.errors import CarvanaError, CorruptFileError
from pipeline.inference.base_predictor import BasePredictor
from pipeline.inference.probability_map import ProbabilityMap, maps_of_views
from pipeline.models.networks import UNet, dry_run_error, load_model, prepare_for_gpu
from pipeline.models.tensors import (
    compile_or_eager,
    memory_format,
    resolve_device,
    resolve_precision,
    to_batch,
    upsample_and_quantize_tensor,
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
        self._reset()
        self._since = time.perf_counter()

    def start(self) -> None:
        """Begin a stream; measurements that were not read are dropped."""
        with self._lock:
            self._reset()
            self._since = time.perf_counter()

    def add_batch(self, images: int, spans: DeviceSpans) -> None:
        """Add a batch that the device has finished."""
        with self._lock:
            record = self._rest if self._warm else self._warmup
            record.images += images
            for view, seconds in spans.seconds():
                record.views[view] += seconds
            self._warm = True
            # Each batch has the time since the one before: at a lap, a thread may work on the next one already.
            now = time.perf_counter()
            record.seconds += now - self._since
            self._since = now

    def lap(self) -> tuple[TimingRecord, TimingRecord]:
        """Return the records since the last lap: of the warm-up batch (no images if there was none) and of the rest."""
        with self._lock:
            records = self._warmup, self._rest
            self._reset()
        return records

    def _reset(self) -> None:
        self._warmup, self._rest = (TimingRecord(views=dict.fromkeys(self._views, 0.0)) for _ in range(2))


class GpuLink:
    """Copies between pinned memory and a GPU, beside its computation: each kind of work has a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._uploads, self._downloads = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]

    def buffer(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return memory of the host that the GPU can copy from and to by itself."""
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def upload(self, host: torch.Tensor) -> torch.Tensor:
        """Return a copy on the GPU; what is computed from now on waits for it, the caller does not."""
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._uploads):
            uploaded = host.to(self.device, non_blocking=True)
        computing.wait_stream(self._uploads)
        uploaded.record_stream(computing)
        return uploaded

    def download(self, results: Sequence[torch.Tensor], hosts: Sequence[torch.Tensor]) -> Callable[[], object]:
        """Copy results to the host once they are computed; returns a function that waits until they are there."""
        self._downloads.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._downloads):
            for result, host in zip(results, hosts, strict=True):
                host.copy_(result, non_blocking=True)
                result.record_stream(self._downloads)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(self._downloads)
        return done.synchronize


class PinnedRing:
    """Keeps a few batches under way between the host and a GPU, in buffers that are used again and again.

    A buffer is used again only after its batch was collected. Only ``collect`` waits for the GPU.
    """

    def __init__(self, link: GpuLink, depth: int) -> None:
        self.depth = depth
        self._link = link
        self._free: deque[_Slot] = deque(_Slot() for _ in range(depth))
        self._under_way: deque[tuple[_Slot, Callable[[], object]]] = deque()

    def __len__(self) -> int:
        """Return the number of batches under way."""
        return len(self._under_way)

    def submit(self, arrays: Sequence[UInt8Array], compute: Callable[[torch.Tensor], Sequence[torch.Tensor]]) -> None:
        """Upload arrays of one shape as a batch and compute its results; at most ``depth`` batches are under way."""
        slot = self._free.popleft()
        host = slot.buffers(self._link, "in", [((len(arrays), *arrays[0].shape), torch.uint8)])[0]
        for row, array in zip(host, arrays, strict=True):
            row.numpy()[...] = array
        results = compute(self._link.upload(host))
        hosts = slot.buffers(self._link, "out", [(result.shape, result.dtype) for result in results])
        self._under_way.append((slot, self._link.download(results, hosts)))

    @contextmanager
    def collect(self) -> Iterator[list[NDArray[Any]]]:
        """Wait for the oldest batch and give its results, which are valid inside the block only."""
        slot, wait = self._under_way.popleft()
        wait()
        yield [host.numpy() for host in slot.kept["out"]]
        self._free.append(slot)


class _Slot:
    """Buffers of one batch, which are replaced only if its shapes change."""

    def __init__(self) -> None:
        self.kept: dict[str, list[torch.Tensor]] = {}

    def buffers(
        self, link: GpuLink, kind: str, wanted: Sequence[tuple[Sequence[int], torch.dtype]]
    ) -> list[torch.Tensor]:
        kept = self.kept.get(kind, [])
        if [(tuple(host.shape), host.dtype) for host in kept] != [(tuple(shape), dtype) for shape, dtype in wanted]:
            self.kept[kind] = [link.buffer(shape, dtype) for shape, dtype in wanted]
        return self.kept[kind]


_RING_DEPTH = 3
"""Batches under way to and from a GPU: one that it computes, one on each side."""


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
        compile: bool = False,
    ) -> None:
        self.folder = folder
        self.views = list(views)
        self._views = [TTATransform.parse(name) for name in views]
        self.timer = PredictionTimer(views)
        self.device = resolve_device(device)
        self.dtype = resolve_precision(precision, self.device)
        net, self.input = load_model(folder, weights)
        self._takes_any_size = isinstance(net.network, UNet)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # batches of one shape, so that a search for the fastest kernels pays
            net = prepare_for_gpu(net, self.dtype)
        self.net = net.to(self.device).to(memory_format=memory_format(self.device))
        self._run_net: Callable[[torch.Tensor], torch.Tensor] | None = compile_or_eager(self.net) if compile else None
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
        if self._takes_any_size:
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
            self.check_finite(finite)
            with self._turn, spans.span(name):
                # One by one: on a CPU, a float array that is reused stays in the cache.
                for number, probs_VHW in enumerate(probs):
                    height, width = probs_VHW.shape[1:]
                    one_11HW = logits_B1HW[number : number + 1]
                    probs_VHW[index] = upsample_and_quantize_tensor(one_11HW, height, width)[0]
        return spans

    @torch.no_grad()
    def gpu_maps(self, pixels_BhwC: torch.Tensor, size: tuple[int, int], merged: bool) -> "GpuMaps":
        """Return the maps of a batch, uint8 (B, h, w, C) on a GPU; waits for nothing."""
        pixels_BCHW = pixels_BhwC.permute(0, 3, 1, 2).float()
        shape = (len(pixels_BCHW), len(self.views), *size)
        probs_BVHW = torch.empty(shape, dtype=torch.uint8, device=self.device)
        finite, spans = torch.ones((), dtype=torch.bool, device=self.device), DeviceSpans(self.device)
        for index in self._view_order():
            with spans.span(self.views[index]):
                logits_B1HW = self._logits(self._views[index], pixels_BCHW)
                finite &= torch.isfinite(logits_B1HW).all()
                probs_BVHW[:, index] = upsample_and_quantize_tensor(logits_B1HW, *size)
        if merged and len(self.views) > 1:
            # int16, since torch adds no uint16 on a GPU; the sum of up to 128 views fits.
            probs_BVHW = probs_BVHW.sum(1, keepdim=True, dtype=torch.int16)
        nonzero_BVHW = probs_BVHW != 0
        return GpuMaps((probs_BVHW, nonzero_BVHW.any(3), nonzero_BVHW.any(2), finite), spans)

    def _view_order(self) -> list[int]:
        """Return the order of views, another first each time, since the first of a batch also pays shared costs."""
        first = next(self._batches)
        return [(first + index) % len(self.views) for index in range(len(self.views))]

    def _logits(self, view: TTATransform, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        # A GPU's net is cast already.
        cast = self.dtype != torch.float32 and self.device.type != "cuda"
        with torch.autocast(self.device.type, self.dtype, enabled=cast):
            return view.deaugment((self._run_net or self.net)(view.augment(pixels_BCHW)))

    def check_finite(self, finite: object) -> None:
        """Raise CarvanaError unless ``finite`` is true."""
        if not finite:
            raise CarvanaError(
                f"The output of {self.folder} is NaN or infinite in {self.dtype}. Set predict.precision to 32, "
                "or train again with a lower train.lr."
            )


@dataclass(frozen=True)
class GpuMaps:
    """Maps of a batch on a GPU."""

    tensors: tuple[torch.Tensor, ...]
    """Probabilities (B, V, H, W), rows (B, V, H) and columns (B, V, W) that have any, and if all logits are finite."""
    spans: DeviceSpans


def predict_stream(
    predictor: TorchPredictor,
    image_ids: Sequence[str],
    read: Callable[[str], UInt8Array],
    size: tuple[int, int],
    batch_size: int,
    threads: int,
    merged: bool,
) -> Iterator[tuple[str, list[ProbabilityMap] | CorruptFileError]]:
    """Yield every image id in order with its maps at ``size`` (height, width), or with the error of reading it.

    ``merged`` sums the views to one map. While the net runs, ``threads`` read and shrink images, and the caller
    handles the previous batch; a few batches wait in memory at most. The predictor's timer measures it.
    """

    def prepare(image_id: str) -> PreparedImage:
        try:
            return image_id, predictor.preprocess(read(image_id))
        except CorruptFileError as error:
            return image_id, error

    predict = _predict_on_gpu if predictor.device.type == "cuda" else _predict_on_cpu
    predictor.timer.start()
    with ThreadPoolExecutor(threads) as readers:
        prepared = ordered_map(readers, prepare, image_ids, ahead=2 * batch_size)
        batches = iter(lambda: list(itertools.islice(prepared, batch_size)), [])
        for batch, maps in predict(predictor, batches, size, batch_size, merged):
            for image_id, pixels in batch:
                yield image_id, pixels if isinstance(pixels, CorruptFileError) else next(maps)


PreparedImage = tuple[str, UInt8Array | CorruptFileError]
"""Image id with the net's input, or with the error of reading the image."""

_BatchOfMaps = tuple[list[PreparedImage], Iterator[list[ProbabilityMap]]]
"""A batch, and the maps of its readable images, in order."""


def _readable(batch: list[PreparedImage]) -> tuple[list[str], list[UInt8Array]]:
    """Return ids and inputs of the images of a batch that could be read."""
    pairs = [(image_id, pixels) for image_id, pixels in batch if not isinstance(pixels, CorruptFileError)]
    return [image_id for image_id, _ in pairs], [pixels for _, pixels in pairs]


def _predict_on_cpu(
    predictor: TorchPredictor,
    batches: Iterator[list[PreparedImage]],
    size: tuple[int, int],
    batch_size: int,
    merged: bool,
) -> Iterator[_BatchOfMaps]:
    def predict(batch: list[PreparedImage]) -> tuple[list[PreparedImage], UInt8Array]:
        _, inputs = _readable(batch)
        return batch, predictor.predict_u8(inputs, *size) if inputs else np.empty((0, 0, *size), np.uint8)

    with ThreadPoolExecutor(1) as net:
        for batch, probs_BVHW in ordered_map(net, predict, batches, ahead=1):
            maps = (
                maps_of_views(image_id, predictor.views, probs_VHW, merged)
                for image_id, probs_VHW in zip(_readable(batch)[0], probs_BVHW, strict=True)
            )
            yield batch, maps


def _predict_on_gpu(
    predictor: TorchPredictor,
    batches: Iterator[list[PreparedImage]],
    size: tuple[int, int],
    batch_size: int,
    merged: bool,
) -> Iterator[_BatchOfMaps]:
    """Submit batches before the results of earlier ones are collected, so that the GPU always has work."""
    ring = PinnedRing(GpuLink(predictor.device), _RING_DEPTH)
    waiting: deque[tuple[list[PreparedImage], DeviceSpans | None]] = deque()

    def oldest() -> _BatchOfMaps:
        batch, spans = waiting.popleft()
        return batch, iter(_collect(predictor, ring, batch, spans, merged) if spans else [])

    for batch in batches:
        while len(ring) == ring.depth:
            yield oldest()
        waiting.append((batch, _submit(predictor, ring, batch, size, batch_size, merged)))
    while waiting:
        yield oldest()


def _submit(
    predictor: TorchPredictor,
    ring: PinnedRing,
    batch: list[PreparedImage],
    size: tuple[int, int],
    batch_size: int,
    merged: bool,
) -> DeviceSpans | None:
    """Give a batch to the GPU; returns the device's times, or None if no image could be read."""
    _, inputs = _readable(batch)
    if not inputs:
        return None
    spans: list[DeviceSpans] = []

    def compute(pixels_BhwC: torch.Tensor) -> Sequence[torch.Tensor]:
        maps = predictor.gpu_maps(pixels_BhwC, size, merged)
        spans.append(maps.spans)
        return maps.tensors

    # Filled up, since kernels are chosen, and nets compiled, for batches of one size.
    ring.submit(inputs + inputs[:1] * (batch_size - len(inputs)), compute)
    return spans[0]


def _collect(
    predictor: TorchPredictor, ring: PinnedRing, batch: list[PreparedImage], spans: DeviceSpans, merged: bool
) -> list[list[ProbabilityMap]]:
    """Return the maps of the oldest batch on the GPU."""
    image_ids, _ = _readable(batch)
    with ring.collect() as (probs_BVHW, rows_BVH, columns_BVW, finite):
        predictor.check_finite(finite)
        predictor.timer.add_batch(len(image_ids), spans)
        views = ["+".join(predictor.views)] if merged else predictor.views
        count = len(predictor.views) if merged else 1
        if probs_BVHW.dtype == np.int16:
            probs_BVHW = probs_BVHW.view(np.uint16)
        return [
            [
                ProbabilityMap.cut(image_id, view, count, probs_BVHW[b, v], rows_BVH[b, v], columns_BVW[b, v])
                for v, view in enumerate(views)
            ]
            for b, image_id in enumerate(image_ids)
        ]
