"""Compare two ways of doing the same: alternating timings, and peak memory."""

import gc
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

Contender = Callable[[], object]
"""A dataclass that can be pickled. Each call does the whole work; what is loaded only once is loaded in the first."""


@dataclass(frozen=True)
class Row:
    """One comparison."""

    name: str
    ours_ms: float
    """Median milliseconds per item."""
    theirs_ms: float
    ratio: float
    """Median of theirs / ours over the rounds: more than 1 if ours is faster."""
    lowest: float
    """Smallest ratio of a round."""
    highest: float
    """Largest ratio of a round."""
    target: float | None
    """Ratio to reach."""
    our_mb: float | None
    """Peak memory in megabytes; None where it can't be measured."""
    their_mb: float | None


def compare(
    name: str,
    ours: Contender,
    theirs: Contender,
    items: int,
    rounds: int,
    target: float | None = None,
    warm: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> Row:
    """Time two contenders, each on the same ``items`` items, and return the comparison.

    They alternate, so that other load on the machine slows both. With ``warm``, each runs once before the timing.
    ``clock`` returns seconds: of the wall clock, or those that the processor worked (``time.process_time``).
    """
    if warm:
        ours(), theirs()
    pairs = []
    for number in range(rounds):
        # Each goes first in half of the rounds.
        order = (ours, theirs) if number % 2 else (theirs, ours)
        seconds = {contender: seconds_of(contender, clock) for contender in order}
        pairs.append((seconds[ours], seconds[theirs]))
    ratios = [their_seconds / our_seconds for our_seconds, their_seconds in pairs]
    ours_ms, theirs_ms = (statistics.median(column) / items * 1e3 for column in zip(*pairs, strict=True))
    peaks = peak_mb(ours), peak_mb(theirs)
    return Row(name, ours_ms, theirs_ms, statistics.median(ratios), min(ratios), max(ratios), target, *peaks)


def peak_mb(contender: Contender) -> float | None:
    """Return the growth of resident memory, in megabytes, in the first call of a new process; None if not on Linux.

    Unlike tracemalloc, it includes the memory of OpenCV, Arrow and torch. Modules imported before do not count.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        # A copy, without what this contender has loaded already.
        return pool.submit(_peak_mb, replace(contender)).result()


def format_mb(mb: float | None) -> str:
    """Return megabytes as text, or a dash if they were not measured."""
    return "-" if mb is None else f"{mb:.1f}"


def table(rows: list[Row]) -> str:
    """Return the comparisons as a text table."""
    lines = [
        f"{'':<56}{'ours':>10}{'theirs':>10}{'ratio':>8}  {'range':<13}{'target':>6}{'peak MB: ours':>16}{'theirs':>8}"
    ]
    for r in rows:
        spread, target = f"{r.lowest:.2f}-{r.highest:.2f}", f"{r.target:g}" if r.target else ""
        peaks = [format_mb(mb) for mb in (r.our_mb, r.their_mb)]
        lines.append(
            f"{r.name:<56}{r.ours_ms:>10.2f}{r.theirs_ms:>10.2f}{r.ratio:>8.2f}  {spread:<13}{target:>6}"
            f"{peaks[0]:>16}{peaks[1]:>8}"
        )
    return "\n".join(lines)


def seconds_of(contender: Contender, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds of one call, by the wall clock or another."""
    gc.collect()
    start = clock()
    contender()
    return clock() - start


def _peak_mb(contender: Contender) -> float:
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current resident memory
    before = _resident_peak_kb()
    contender()
    return (_resident_peak_kb() - before) * 1024 / 1e6


def _resident_peak_kb() -> int:
    status = Path(f"/proc/{os.getpid()}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
