"""Each benchmark runs: once, on few items. What it measures is for ``make bench``."""

import importlib
import json
from pathlib import Path

import pytest

from benchmarks.__main__ import NAMES
from benchmarks.bench_gpu import run_gpu
from benchmarks.timing import table


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_benchmark_runs(tiny_sample: Path, name: str) -> None:
    rows = importlib.import_module(f"benchmarks.bench_{name}").run(tiny_sample, tiny=True)
    assert rows
    assert all(row.ours_ms > 0 and row.ratio > 0 for row in rows)
    assert all(row.name in table(rows) for row in rows)


@pytest.mark.slow
def test_gpu_benchmark_runs_on_a_cpu_and_writes_its_figures(tiny_sample: Path, tmp_path: Path) -> None:
    run_gpu(tiny_sample, tiny=True, out=tmp_path / "cpu.json")
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert found["device"] == "cpu"
    assert all(figure["value"] > 0 for figure in found["figures"])
    names = " ".join(figure["name"] for figure in found["figures"])
    assert all(
        part in names for part in ("copy", "forward", "training step", "loader", "training, eager", "prediction")
    )


def test_every_benchmark_is_listed() -> None:
    folder = Path(importlib.import_module("benchmarks").__path__[0])
    assert {path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py")} == {*NAMES, "gpu"}
