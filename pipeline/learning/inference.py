"""A trained net at work: one picture at a time, or a stream of them."""

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Self

import numpy as np
import torch

from pipeline.errors import CorruptFileError, PipelineError
from pipeline.learning.devices import resolve_device, resolve_precision
from pipeline.learning.models import load
from pipeline.learning.pixels import grow, memory_format, to_batch, to_levels
from pipeline.learning.rasters import Pixels
from pipeline.learning.settings import Device, Precision
from pipeline.learning.speaker import Levels, Speaker
from pipeline.learning.stopwatch import Spans, Stopwatch
from pipeline.learning.views import View


class Predictor(Speaker):
    """A trained net's folder, loaded once, that turns pictures into probabilities.

    Needs neither Lightning nor the settings of training. Raises PipelineError if the folder holds no net that fits.
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
        self._views = [View.parse(name) for name in views]
        self.stopwatch = Stopwatch(views)
        self.device = resolve_device(device)
        self.dtype = resolve_precision(precision, self.device)
        net, self.input = load(folder, weights)
        self.net = net.to(self.device).to(memory_format=memory_format(self.device))
        self._turn = Lock()
        self._batches = itertools.count()

    def looking_at(self, views: Sequence[str]) -> Self:
        """Return the same net, with which it shares its weights but no stopwatch, that looks at other views."""
        other = copy.copy(self)
        other.views = list(views)
        other._views = [View.parse(name) for name in views]
        other.stopwatch = Stopwatch(views)
        return other

    def levels(self, inputs: list[Pixels], height: int, width: int) -> Levels:
        """Return what ``Speaker.levels`` does, and tell the stopwatch how long it took."""
        shape = (len(inputs), len(self.views), height, width)
        levels_BVHW = torch.empty(shape, dtype=torch.uint8, device=self.device)
        spans = self._speak(inputs, list(levels_BVHW))
        levels = np.asarray(levels_BVHW.cpu())
        self.stopwatch.batch(len(inputs), spans)
        return levels

    def levels_at(self, inputs: list[Pixels], sizes: Sequence[tuple[int, int]]) -> list[Levels]:
        """Return what ``Speaker.levels_at`` does, and tell the stopwatch how long it took."""
        levels = [torch.empty((len(self.views), *size), dtype=torch.uint8, device=self.device) for size in sizes]
        spans = self._speak(inputs, levels)
        rasters = [np.asarray(levels_VHW.cpu()) for levels_VHW in levels]
        self.stopwatch.batch(len(inputs), spans)
        return rasters

    @torch.inference_mode()
    def _speak(self, inputs: list[Pixels], levels: Sequence[torch.Tensor]) -> Spans:
        """Fill the ``levels`` (V, height, width) of each prepared picture."""
        pixels_BCHW = to_batch(inputs, self.device).float()
        spans = Spans(self.device)
        for index in self._order():
            name, view = self.views[index], self._views[index]
            # In turn: a GPU does what it is given in that order, so that no span holds what another batch gave it.
            with self._turn, spans.of(name):
                logits_B1HW = self._logits(view, pixels_BCHW)
                finite = torch.isfinite(logits_B1HW).all()
            self._demand_finite(finite)
            with self._turn, spans.of(name):
                # One by one: on a CPU, a raster of floats that is used again and again stays in the cache.
                for number, levels_VHW in enumerate(levels):
                    height, width = levels_VHW.shape[1:]
                    levels_VHW[index] = to_levels(grow(logits_B1HW[number : number + 1], height, width))[0]
        return spans

    def _order(self) -> list[int]:
        """Return the views, another first each time: the first of a batch pays what all share, and time is taken."""
        first = next(self._batches)
        return [(first + index) % len(self.views) for index in range(len(self.views))]

    def _logits(self, view: View, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return view.undo(self.net(view.apply(pixels_BCHW)))

    def _demand_finite(self, finite: torch.Tensor) -> None:
        if not finite:
            raise PipelineError(
                f"The net of {self.folder} gives no finite numbers in {self.dtype}: set predict.precision to 32, "
                "or train it anew with a lower train.lr."
            )


def stream(
    predictor: Predictor,
    image_ids: Sequence[str],
    read: Callable[[str], Pixels],
    size: tuple[int, int],
    batch_size: int,
    threads: int,
) -> Iterator[tuple[str, Levels | CorruptFileError]]:
    """Yield every image id in order with its levels (V, *size), or with why it can't be read.

    While the net works, ``threads`` read and shrink images for it, and the caller sees to the batch before; at most a
    few batches wait in memory. What a stream that was taken to its end took, the predictor's stopwatch tells.
    """

    def prepared(image_id: str) -> Pixels | CorruptFileError:
        try:
            return predictor.prepare(read(image_id))
        except CorruptFileError as error:
            return error

    def predicted(batch: list[Prepared]) -> list[tuple[str, Levels | CorruptFileError]]:
        sound = [pixels for _, pixels in batch if not isinstance(pixels, CorruptFileError)]
        levels = iter(predictor.levels(sound, *size) if sound else ())
        return [(image_id, p if isinstance(p, CorruptFileError) else next(levels)) for image_id, p in batch]

    predictor.stopwatch.start()
    # A GPU is kept busy by two: one uploads its batch while the other's is computed.
    at_once = 2 if predictor.device.type == "cuda" else 1
    with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(at_once) as net:
        running: deque[Future[list[tuple[str, Levels | CorruptFileError]]]] = deque()
        for batch in _ahead(readers, prepared, image_ids, batch_size):
            running.append(net.submit(predicted, batch))
            if len(running) > at_once:
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()
    predictor.stopwatch.stop()


Prepared = tuple[str, Pixels | CorruptFileError]


def _ahead(
    pool: ThreadPoolExecutor,
    prepare: Callable[[str], Pixels | CorruptFileError],
    image_ids: Sequence[str],
    batch_size: int,
) -> Iterator[list[Prepared]]:
    """Yield batches in order, with two more being prepared meanwhile."""
    waiting: deque[list[tuple[str, Future[Pixels | CorruptFileError]]]] = deque()
    for start in range(0, len(image_ids), batch_size):
        batch = image_ids[start : start + batch_size]
        waiting.append([(image_id, pool.submit(prepare, image_id)) for image_id in batch])
        if len(waiting) > 2:
            yield [(image_id, future.result()) for image_id, future in waiting.popleft()]
    while waiting:
        yield [(image_id, future.result()) for image_id, future in waiting.popleft()]
