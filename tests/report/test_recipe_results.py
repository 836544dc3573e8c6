"""The table of kept results."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.errors import CarvanaError
from pipeline.report.recipe_results import (
    GPU_RESULTS_DIR,
    RESULTS_DIR,
    gpu_tables,
    results_table,
    scores_of_split,
    show_results,
    throughput,
)
from pipeline.utils.files import write_json


def images(cars: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [("oof", "small", f"{car:012x}", rng.uniform(0.9, 1)) for car in range(cars) for _ in range(16)]
    table = pd.DataFrame(rows, columns=["split", "model", "car", "dice"])
    return table.assign(iou=table["dice"] - 0.05, accuracy=0.99)


def result(name: str, dice: float, **changes: Any) -> dict[str, Any]:
    score = {
        "dice": dice,
        "iou": 0.9,
        "accuracy": 0.98,
        "interval": [dice - 0.01, dice + 0.01],
        "images": 16,
        "cars": 9,
    }
    return {
        "name": name,
        "data": {"source": "sample", "cars": 14, "images": 224},
        "folds": {"count": 2, "active": [0, 1], "holdout_cars": 2, "seed": 0},
        "seeds": [0],
        "setting": "aaaaaa",
        "models": [{"name": name, "input_size": "128 x 128 grey", "epochs": 10, "spec": {"architecture": "unet"}}],
        "parameters": 1_862_849,
        "views": {"oof": ["identity"], "test": ["identity", "hflip"]},
        "minutes": 12.34,
        "trained_per_second": 20.0,
        "predicted_per_second": None,
        "device": "the CPU in float32",
        "oof": score,
        "holdout": None,
    } | changes


def test_scores_with_their_interval() -> None:
    rows = images(9)
    found = scores_of_split(rows, "oof", "small")
    assert found is not None
    assert found["dice"] == pytest.approx(rows["dice"].mean(), abs=1e-6)
    low, high = found["interval"]
    assert low < found["dice"] < high <= 1
    assert (found["images"], found["cars"]) == (144, 9)


def test_no_interval_of_few_cars_and_no_scores_of_none() -> None:
    few = scores_of_split(images(3), "oof", "small")
    assert few is not None
    assert few["interval"] is None
    assert scores_of_split(images(3), "holdout", "small") is None


def test_speeds_add_up_over_folds() -> None:
    timing = {"seconds": 90.0, "training_seconds": 60.0, "images": 300, "device": "a GPU"}
    found = throughput([timing, timing], [(10, 2.0), (30, 2.0)])
    assert found == {"minutes": 3.0, "trained_per_second": 5.0, "predicted_per_second": 10.0, "device": "a GPU"}
    assert throughput([timing], [(0, 0.0)])["predicted_per_second"] is None


def test_random_initialization_is_marked() -> None:
    model = {"name": "e", "input_size": "128 x 128", "epochs": 20}
    specs = [{"architecture": "smp_unet", "encoder_weights": weights} for weights in (None, "imagenet")]
    text = results_table([result(f"e{n}", 0.9, models=[model | {"spec": spec}]) for n, spec in enumerate(specs)])
    assert "| e0 * |" in text and "| e1 |" in text


def test_only_equal_folds_and_data_share_a_table_best_first() -> None:
    other = {"count": 3, "active": [0], "holdout_cars": 0, "seed": 0}
    text = results_table([result("b", 0.96), result("a", 0.95), result("c", 0.97, folds=other, setting="bbbbbb")])
    first, second = text.split("## ")[1:]
    assert "identity, hflip" in first.splitlines()[0]
    assert "14 cars; 1 of 3 folds" in first.splitlines()[0]
    assert "| c |" in first
    assert second.index("| b |") < second.index("| a |")
    row = next(line for line in second.splitlines() if line.startswith("| b |"))
    assert row == (
        "| b | 1,862,849 | 128 x 128 grey | 10 | 0.96000 [0.95000, 0.97000] | - | 0.90000 | 98.00% | 12.3 | 20.0 | - |"
    )
    assert row.count("|") == second.splitlines()[2].count("|")


def test_the_table_in_a_file_and_in_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    RESULTS_DIR.mkdir(parents=True)
    (RESULTS_DIR / "a@sample-14.json").write_text(json.dumps(result("a", 0.95)))
    show_results(Path("docs/results.md"))
    assert "| a | 1,862,849 |" in Path("docs/results.md").read_text()
    show_results(None)
    assert any(line.split()[:2] == ["a", "1,862,849"] for line in capsys.readouterr().out.splitlines())
    (RESULTS_DIR / "older.json").write_text(json.dumps({"name": "a"}))
    with pytest.raises(CarvanaError, match=r"older\.json.*data"):
        show_results(None)
    (RESULTS_DIR / "older.json").write_text("{")
    with pytest.raises(CarvanaError, match=r"older\.json"):
        show_results(None)


def test_figures_of_a_gpu_are_shown_as_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert gpu_tables() == ""
    figures = [{"name": "forward, eager", "value": 1234.5678, "unit": "ms/image"}]
    card = {"device": "NVIDIA T4", "torch": "2.11", "cores": 2, "precision": "float16", "figures": figures}
    write_json(GPU_RESULTS_DIR / "t4.json", card)
    assert "NVIDIA T4, 2 cores, float16, torch 2.11" in gpu_tables()
    assert "| forward, eager | 1,234.568 | ms/image |" in gpu_tables()
    write_json(GPU_RESULTS_DIR / "t4.json", {"device": "NVIDIA T4"})
    with pytest.raises(CarvanaError, match=r"t4\.json"):
        gpu_tables()
