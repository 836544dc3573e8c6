"""Each benchmark runs: once, on few items. What it measures is for ``make bench``."""

import importlib
from pathlib import Path

import pytest

from benchmarks.__main__ import NAMES
from benchmarks.timing import table


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_benchmark_runs(tiny_sample: Path, name: str) -> None:
    rows = importlib.import_module(f"benchmarks.bench_{name}").run(tiny_sample, tiny=True)
    assert rows
    assert all(row.ours_ms > 0 and row.ratio > 0 for row in rows)
    assert all(row.name in table(rows) for row in rows)


def test_every_benchmark_is_listed() -> None:
    folder = Path(importlib.import_module("benchmarks").__path__[0])
    assert {path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py")} == set(NAMES)
