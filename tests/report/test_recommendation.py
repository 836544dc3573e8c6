"""``carvana ablate``: the table, the recommendation, and applying it to params.yaml."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.ablation.search_space import AblationSpace, ablation_space
from pipeline.ablation.statistics import AblationStatistics
from pipeline.cli import main
from pipeline.config import ScoredSplit, read_params
from pipeline.workspace import net_digest
from tests import ROOT
from tests.fakes.fake_ablation import trial_of


def found(space: AblationSpace, split: ScoredSplit, cars: int, gains: dict[str, float]) -> AblationStatistics:
    """Return statistics of the whole grid; each cell that is a key of ``gains`` adds its value to the Dice."""
    random = np.random.default_rng(0)
    settings = space.grid(split)
    cells = [" ".join(str(cell) for cell in setting.row().values()).split() for setting in settings]
    gain_S = [sum(gain for name, gain in gains.items() if name in row) for row in cells]
    base_C = 0.99 + random.normal(0, 0.003, cars)
    noise_SC = random.normal(0, 0.00001, (len(settings), cars))
    seconds = {(net, view): 0.1 for setting in settings for net in setting.nets for view in setting.views}
    scores = trial_of(np.array(gain_S)[:, None] + base_C + noise_SC, settings)
    return AblationStatistics(split, scores, seconds, space.ablation.tolerance)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params.yaml and an ablation in which ``hflip`` lowers Dice and threshold 0.4 raises it."""
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
    for fold in range(3):
        (tmp_path / f"folds/small/{fold}").mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (tmp_path / f"folds/small/{fold}/{name}").write_text(f"{name} of {fold}")
    put(tmp_path, cars=10)
    return tmp_path


def put(folder: Path, cars: int, **changes: Any) -> None:
    space = ablation_space(read_params())
    statistics = [found(space, split, cars, {"hflip": -0.001, "0.4": 0.0005}) for split in ("oof", "holdout")]
    (folder / "reports").mkdir(exist_ok=True)
    nets = {f"small/{fold}": net_digest(folder / f"folds/small/{fold}", "last") for fold in range(3)}
    splits = {v.split: v.summary() | {"warnings": space.warnings(v.split)} for v in statistics}
    summary = {"search_space": space.fingerprint(), "nets": nets} | splits | changes
    (folder / "reports/ablation.json").write_text(json.dumps(summary))
    pd.concat([v.table for v in statistics]).to_csv(folder / "reports/ablation.csv", index=False)


def run(*arguments: str, status: int = 0) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["ablate", *arguments])
    assert caught.value.code == status


def test_the_table_shows_the_current_setting_and_the_best(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run()
    printed = capsys.readouterr().out
    assert "Held-out cars" in printed
    current, best = (line.split() for line in printed.partition("setting\n")[2].splitlines()[:2])
    assert current[1] == "current"
    assert best[-6:] == ["identity,", "mean", "of", "probabilities,", "threshold", "0.4"]
    assert best[5:8] == ["1", "0.1", "s"]
    run("--split", "oof")
    assert "Held-out" not in capsys.readouterr().out


def test_recommendation_as_text(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--best")
    printed = " ".join(capsys.readouterr().out.split())
    assert "Held-out cars 160 images of 10 cars" in printed
    assert "10 groups of cars" in printed
    recommended = printed.rpartition("Recommended")[2]
    assert "identity, mean of probabilities, threshold 0.4" in recommended
    assert "17%" in recommended


def test_apply_writes_the_recommendation_of_held_out_cars_and_keeps_comments(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (project / "params.yaml").read_text()
    run("--apply")
    params = read_params()
    assert params.ensemble.threshold == 0.4
    assert params.predict.tta.test == ("identity",)
    assert params.ensemble.folds is not None
    assert len(params.ensemble.folds) == 1
    after = (project / "params.yaml").read_text()
    comments = [[line.partition("#")[2] for line in text.splitlines() if "#" in line] for text in (before, after)]
    assert comments[0] == comments[1]
    changed = set(before.splitlines()) - set(after.splitlines())
    assert {line.partition("#")[0].strip() for line in changed} == {
        "folds: null",
        "threshold: 0.5",
        "test: [identity, hflip]",
    }
    printed = capsys.readouterr().out
    assert "ensemble.threshold: 0.5 -> 0.4" in printed
    assert "dvc repro" in printed


def test_apply_from_out_of_fold_leaves_folds_as_they_are(project: Path) -> None:
    run("--apply", "--split", "oof")
    params = read_params()
    assert params.ensemble.threshold == 0.4
    assert params.ensemble.folds is None
    assert params.ensemble.merge == "mean_probability"


def test_apply_after_a_change_needs_a_new_ablation(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--apply")
    run("--apply", status=1)
    assert "params.yaml" in capsys.readouterr().err
    put(project, cars=10)
    text = (project / "params.yaml").read_text()
    run("--apply")
    assert (project / "params.yaml").read_text() == text
    assert "Nothing changed" in capsys.readouterr().out


def test_a_skipped_holdout_split_leaves_the_out_of_fold_recommendation(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "Fold ensembles are not scored."
    put(project, cars=10, holdout={"skipped": reason})
    run("--best")
    assert reason in " ".join(capsys.readouterr().out.split())
    run("--apply")
    assert "Out of fold" in capsys.readouterr().out
    assert read_params().ensemble.folds is None


def test_with_too_few_cars_nothing_is_applied(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(project, cars=4)
    text = (project / "params.yaml").read_text()
    run("--best")
    assert "4 cars" in capsys.readouterr().out
    run("--apply", status=1)
    assert "4 cars" in capsys.readouterr().err
    assert (project / "params.yaml").read_text() == text


def test_without_significant_differences_the_current_setting_is_kept(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(1)
    space = ablation_space(read_params())
    settings = space.grid("holdout")
    seconds = {(net, view): 0.1 for setting in settings for net in setting.nets for view in setting.views}
    dice_SC = 0.99 + random.normal(0, 0.003, (len(settings), 8))
    statistics = AblationStatistics("holdout", trial_of(dice_SC, settings), seconds, tolerance=0.0002)
    put(project, cars=10, holdout=statistics.summary() | {"warnings": []})
    text = (project / "params.yaml").read_text()
    run("--apply")
    assert "Keep the current setting" in capsys.readouterr().out
    assert (project / "params.yaml").read_text() == text
    summary = statistics.summary()
    assert summary["cheapest"]["passes"] == 1  # recommended only with tolerance None
    free = replace(statistics, tolerance=None).summary()
    assert free["recommended"]["passes"] == 1


def test_a_recommendation_for_other_nets_is_not_applied(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "folds/small/1/model.safetensors").write_text("trained again")
    run("--apply", status=1)
    assert "small/1" in capsys.readouterr().err


def test_truncated_files_are_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = project / "reports/ablation.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:50]))
    run(status=1)
    assert "reports/ablation.csv" in capsys.readouterr().err
    table.unlink()
    run(status=1)
    assert "reports/ablation.csv" in capsys.readouterr().err
    (project / "reports/ablation.json").write_text("{}")
    run("--best", status=1)
    assert "reports/ablation.json" in capsys.readouterr().err


def test_without_an_ablation(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(project / "reports")
    for option in ("--best", "--apply"):
        run(option, status=1)
        assert "reports/ablation.json" in capsys.readouterr().err
