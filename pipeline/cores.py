"""How many processors this process may use."""

import os
from pathlib import Path


def available_cpus() -> int:
    """Return the number of processors, less those that affinity or a container's quota withholds."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(allowed, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such limit, or "max"
        return allowed
