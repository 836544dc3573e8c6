"""Two ways to do one thing, timed in turns, each with the peak of its memory."""

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
"""A dataclass that can be pickled. Does its whole work each call; what is read or built once, on the first."""


@dataclass(frozen=True)
class Row:
    """One comparison: milliseconds an item, how many times as fast ours is, and megabytes."""

    name: str
    ours_ms: float
    theirs_ms: float
    ratio: float
    lowest: float
    highest: float
    aim: float | None
    our_mb: float | None
    their_mb: float | None


def compare(
    name: str, ours: Contender, theirs: Contender, items: int, rounds: int, aim: float | None = None, warm: bool = True
) -> Row:
    """Time both in turns and return medians, the ratio being the median over rounds of theirs / ours.

    In turns, so that whatever else the machine does slows both; ``warm`` lets each run once off the clock.
    """
    if warm:
        ours(), theirs()
    pairs = []
    for number in range(rounds):
        # Each goes first in half of the rounds.
        seconds = {contender: _seconds(contender) for contender in ((ours, theirs) if number % 2 else (theirs, ours))}
        pairs.append((seconds[ours], seconds[theirs]))
    ratios = [their_seconds / our_seconds for our_seconds, their_seconds in pairs]
    ours_ms, theirs_ms = (statistics.median(column) / items * 1e3 for column in zip(*pairs, strict=True))
    peaks = peak_mb(ours), peak_mb(theirs)
    return Row(name, ours_ms, theirs_ms, statistics.median(ratios), min(ratios), max(ratios), aim, *peaks)


def peak_mb(contender: Contender) -> float | None:
    """Return by how many megabytes a first call raises the resident memory of a new process; None if not on Linux.

    Unlike tracemalloc's count, this holds what OpenCV, Arrow and torch allocate. What was imported before is left out.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        # A copy without what this one has read and built by now.
        return pool.submit(_peak_mb, replace(contender)).result()


def format_mb(mb: float | None) -> str:
    """Return megabytes as text; a dash where they could not be measured."""
    return "-" if mb is None else f"{mb:.1f}"


def table(rows: list[Row]) -> str:
    """Return the rows as text."""
    lines = [
        f"{'':<56}{'ours':>10}{'theirs':>10}{'ratio':>8}  {'range':<13}{'aim':>5}{'peak MB: ours':>16}{'theirs':>8}"
    ]
    for r in rows:
        spread, aim = f"{r.lowest:.2f}-{r.highest:.2f}", f"{r.aim:g}" if r.aim else ""
        peaks = [format_mb(mb) for mb in (r.our_mb, r.their_mb)]
        lines.append(
            f"{r.name:<56}{r.ours_ms:>10.2f}{r.theirs_ms:>10.2f}{r.ratio:>8.2f}  {spread:<13}{aim:>5}"
            f"{peaks[0]:>16}{peaks[1]:>8}"
        )
    return "\n".join(lines)


def _seconds(contender: Contender) -> float:
    gc.collect()
    begin = time.perf_counter()
    contender()
    return time.perf_counter() - begin


def _peak_mb(contender: Contender) -> float:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again at what is resident now
    before = _resident_peak_kb()
    contender()
    return (_resident_peak_kb() - before) * 1024 / 1e6


def _resident_peak_kb() -> int:
    status = Path(f"/proc/{os.getpid()}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
