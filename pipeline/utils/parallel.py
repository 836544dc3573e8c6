"""CPUs, and work on all of them."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar


def available_cpus() -> int:
    """Return the number of CPUs that affinity and a container's quota allow."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(allowed, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such limit, or "max"
        return allowed


S = TypeVar("S")
T = TypeVar("T")


def parallel_map(work: Callable[[S], T], items: Iterator[S]) -> Iterator[T]:
    """Yield results in order, computed by threads on all CPUs; few items wait at a time, to bound memory."""
    with ThreadPoolExecutor(available_cpus()) as pool:
        running: deque[Future[T]] = deque()
        for item in items:
            running.append(pool.submit(work, item))
            if len(running) > 2 * available_cpus():
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
