"""Number of available CPUs, and maps over threads that keep the order and bound what is in memory."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar


def available_cpus() -> int:
    """Return the number of CPUs that this process may use, given its affinity and the quota of its container."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(allowed, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no quota, or "max"
        return allowed


S = TypeVar("S")
T = TypeVar("T")


def parallel_map(work: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """Yield ``work(item)`` of each item, in order, computed by one thread per CPU.

    At most two items per CPU are in progress or waiting, so that memory stays small when items are large.
    """
    cpus = available_cpus()
    with ThreadPoolExecutor(cpus) as pool:
        yield from ordered_map(pool, work, items, ahead=2 * cpus)


def ordered_map(pool: ThreadPoolExecutor, work: Callable[[S], T], items: Iterable[S], ahead: int) -> Iterator[T]:
    """Yield ``work(item)`` of each item, in order, while ``pool`` works on up to ``ahead`` of the next items."""
    running: deque[Future[T]] = deque()
    for item in items:
        running.append(pool.submit(work, item))
        if len(running) > ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()
