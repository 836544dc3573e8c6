"""How many processors this process may use."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar


def available_cpus() -> int:
    """Return the number of processors, less those that affinity or a container's quota withholds."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(allowed, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such limit, or "max"
        return allowed


S = TypeVar("S")
T = TypeVar("T")


def parallel_map(work: Callable[[S], T], items: Iterator[S]) -> Iterator[T]:
    """Yield the results in order, computed on all cores; few items wait at a time, since maps are large."""
    with ThreadPoolExecutor(available_cpus()) as pool:
        running: deque[Future[T]] = deque()
        for item in items:
            running.append(pool.submit(work, item))
            if len(running) > 2 * available_cpus():
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
