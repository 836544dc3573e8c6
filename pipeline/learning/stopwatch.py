"""How long prediction takes: each view on its device, and all of it by the clock on the wall."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock

import torch


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
