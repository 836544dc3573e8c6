"""Number of available CPUs, and a parallel map over threads."""

import os
from collections import deque
from collections.abc import Callable, Iterator
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


def parallel_map(work: Callable[[S], T], items: Iterator[S]) -> Iterator[T]:
    """Yield ``work(item)`` of each item, in order, computed by one thread per CPU.

    At most two items per CPU are in progress or waiting, so that memory stays small when items are large.
    """
    cpus = available_cpus()
    with ThreadPoolExecutor(cpus) as pool:
        running: deque[Future[T]] = deque()
        for item in items:
            running.append(pool.submit(work, item))
            if len(running) > 2 * cpus:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
