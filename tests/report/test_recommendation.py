"""``carvana ablate``: what the ablation found, in words, and put into params.yaml."""

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


def found(choices: AblationSpace, split: ScoredSplit, cars: int, gains: dict[str, float]) -> AblationStatistics:
    """A verdict on the whole grid, where settings that hold a word gain so much."""
    random = np.random.default_rng(0)
    settings = choices.grid(split)
    words = [" ".join(str(cell) for cell in setting.row().values()).split() for setting in settings]
    gain_S = [sum(gain for word, gain in gains.items() if word in of_setting) for of_setting in words]
    base_C = 0.99 + random.normal(0, 0.003, cars)
    noise_SC = random.normal(0, 0.00001, (len(settings), cars))
    seconds = {(net, view): 0.1 for setting in settings for net in setting.nets for view in setting.views}
    trial = trial_of(np.array(gain_S)[:, None] + base_C + noise_SC, settings)
    return AblationStatistics(split, trial, seconds, choices.ablation.tolerance)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params.yaml and the findings of an ablation in which ``hflip`` harms and 0.4 gains."""
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
    for fold in range(3):
        (tmp_path / f"folds/small/{fold}").mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (tmp_path / f"folds/small/{fold}/{name}").write_text(f"{name} of {fold}")
    put(tmp_path, cars=10)
    return tmp_path


def put(folder: Path, cars: int, **facts: Any) -> None:
    choices = ablation_space(read_params())
    verdicts = [found(choices, split, cars, {"hflip": -0.001, "0.4": 0.0005}) for split in ("oof", "holdout")]
    (folder / "reports").mkdir(exist_ok=True)
    nets = {f"small/{fold}": net_digest(folder / f"folds/small/{fold}", "last") for fold in range(3)}
    splits = {v.split: v.summary() | {"warnings": choices.warnings(v.split)} for v in verdicts}
    summary = {"search_space": choices.fingerprint(), "nets": nets} | splits | facts
    (folder / "reports/ablation.json").write_text(json.dumps(summary))
    pd.concat([v.table for v in verdicts]).to_csv(folder / "reports/ablation.csv", index=False)


def run(*arguments: str, status: int = 0) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["ablate", *arguments])
    assert caught.value.code == status


def test_the_table_shows_the_current_setting_and_the_best(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run()
    printed = capsys.readouterr().out
    assert "Held-out cars: current setting" in printed
    lines = [line for line in printed.splitlines() if "per image" in line]
    assert lines[0].split()[1] == "current"
    assert "small, identity, mean of probabilities, threshold 0.4: 0.1 s and 1 forward pass" in lines[1]
    run("--split", "oof")
    assert "Held-out" not in capsys.readouterr().out


def test_recommendation_as_text(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--best")
    printed = " ".join(capsys.readouterr().out.split())
    assert "Held-out cars: 160 images of 10 cars" in printed
    assert "not significantly worse than the best" in printed
    assert "10 groups of cars" in printed
    advice = printed.rpartition("Recommended")[2]
    assert "identity, mean of probabilities, threshold 0.4" in advice
    assert "at 17% of its cost" in advice


def test_apply_writes_what_the_held_out_cars_say_and_keeps_comments(
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
    assert "Nets are not retrained. Test images are predicted" in printed


def test_apply_from_out_of_fold_says_nothing_of_folds(project: Path) -> None:
    run("--apply", "--split", "oof")
    params = read_params()
    assert params.ensemble.threshold == 0.4
    assert params.ensemble.folds is None
    assert params.ensemble.merge == "mean_probability"


def test_apply_twice_changes_nothing_but_wants_a_new_ablation(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--apply")
    run("--apply", status=1)
    assert "params.yaml changed since the last ablation: run 'dvc repro ablate'" in capsys.readouterr().err
    put(project, cars=10)
    text = (project / "params.yaml").read_text()
    run("--apply")
    assert (project / "params.yaml").read_text() == text
    assert "Nothing changed" in capsys.readouterr().out


def test_few_held_out_cars_leave_it_to_the_others(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused = "Fold ensembles are not scored. No cars are held out of all folds."
    put(project, cars=10, holdout={"skipped": refused})
    run("--best")
    assert refused in " ".join(capsys.readouterr().out.split())
    run("--apply")
    assert "Out of fold" in capsys.readouterr().out
    assert read_params().ensemble.folds is None


def test_with_too_few_cars_nothing_is_applied(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(project, cars=4)
    text = (project / "params.yaml").read_text()
    run("--best")
    assert "4 cars are too few" in " ".join(capsys.readouterr().out.split())
    run("--apply", status=1)
    assert "Nothing to apply. 4 cars" in capsys.readouterr().err
    assert (project / "params.yaml").read_text() == text


def test_with_few_cars_that_tell_little_the_current_setting_is_kept(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(1)
    choices = ablation_space(read_params())
    settings = choices.grid("holdout")
    seconds = {(net, view): 0.1 for setting in settings for net in setting.nets for view in setting.views}
    dice_SC = 0.99 + random.normal(0, 0.003, (len(settings), 8))
    verdict = AblationStatistics("holdout", trial_of(dice_SC, settings), seconds, tolerance=0.0002)
    put(project, cars=10, holdout=verdict.summary() | {"warnings": []})
    text = (project / "params.yaml").read_text()
    run("--apply")
    assert "Keep the current setting" in capsys.readouterr().out
    assert (project / "params.yaml").read_text() == text
    summary = verdict.summary()
    assert summary["cheapest"]["passes"] == 1  # which the tolerance of None would advise
    free = replace(verdict, tolerance=None).summary()
    assert free["recommended"]["passes"] == 1


def test_advice_on_other_nets_is_not_applied(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "folds/small/1/model.safetensors").write_text("trained again")
    run("--apply", status=1)
    assert "Net small/1 changed since the last ablation" in capsys.readouterr().err


def test_truncated_files_are_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = project / "reports/ablation.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:50]))
    run(status=1)
    assert "reports/ablation.csv is truncated" in capsys.readouterr().err
    table.unlink()
    run(status=1)
    assert "Cannot read reports/ablation.csv" in capsys.readouterr().err
    (project / "reports/ablation.json").write_text("{}")
    run("--best", status=1)
    assert "written by another version" in capsys.readouterr().err


def test_without_an_ablation(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(project / "reports")
    for option in ("--best", "--apply"):
        run(option, status=1)
        assert "reports/ablation.json" in capsys.readouterr().err
