"""``carvana ablate``: what the ablation found, in words, and put into params.yaml."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.cli import main
from pipeline.ensembling.grid import Choices, Split
from pipeline.ensembling.verdict import Verdict
from pipeline.params import read_params
from tests.project import ROOT
from tests.test_ablation import trial_of


def found(choices: Choices, split: Split, cars: int, gains: dict[str, float]) -> Verdict:
    """A verdict on the whole grid, where settings that hold a word gain so much."""
    random = np.random.default_rng(0)
    settings = choices.grid(split)
    words = [" ".join(str(cell) for cell in setting.row().values()).split() for setting in settings]
    gain_S = [sum(gain for word, gain in gains.items() if word in of_setting) for of_setting in words]
    base_C = 0.99 + random.normal(0, 0.003, cars)
    noise_SC = random.normal(0, 0.00001, (len(settings), cars))
    seconds = {(net, view): 0.1 for setting in settings for net in setting.nets for view in setting.views}
    return Verdict(split, trial_of(np.array(gain_S)[:, None] + base_C + noise_SC, settings), seconds)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params.yaml and the findings of an ablation in which ``hflip`` harms and 0.4 gains."""
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
    put(tmp_path, cars=10)
    return tmp_path


def put(folder: Path, cars: int, **facts: Any) -> None:
    choices = read_params().choices()
    verdicts = [found(choices, split, cars, {"hflip": -0.001, "0.4": 0.0005}) for split in ("oof", "holdout")]
    (folder / "reports").mkdir(exist_ok=True)
    summary = {"choices": choices.described()} | {v.split: v.summary() for v in verdicts} | facts
    (folder / "reports/ablation.json").write_text(json.dumps(summary))
    pd.concat([v.table for v in verdicts]).to_csv(folder / "reports/ablation.csv", index=False)


def run(*arguments: str, status: int = 0) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["ablate", *arguments])
    assert caught.value.code == status


def test_the_table_shows_the_current_setting_and_the_best(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run()
    printed = capsys.readouterr().out
    assert "Held-out cars: the current setting and the best of" in printed
    lines = [line for line in printed.splitlines() if "an image" in line]
    assert lines[0].split()[1] == "now"
    assert "small, identity, probability, 0.4: 1 pass, 100 ms an image" in lines[1]


def test_the_verdict_in_words(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--best")
    printed = capsys.readouterr().out
    assert "Held-out cars: 10 cars, 160 images" in printed
    assert "can't be told apart from the best" in printed
    assert "Chosen on some cars and scored on others" in printed
    cheapest = printed.split("The cheapest of them:\n")[-1].splitlines()[0]
    assert "folds " in cheapest
    assert "identity, probability, 0.4: 1 pass" in cheapest


def test_apply_writes_what_the_held_out_cars_say_and_keeps_comments(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (project / "params.yaml").read_text()
    run("--apply")
    params = read_params()
    assert params.ensemble.threshold == 0.4
    assert params.predict.views.test == ("identity",)
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
    assert "No net is trained anew. The new views of test images will be predicted." in printed


def test_apply_from_out_of_fold_says_nothing_of_folds(project: Path) -> None:
    run("--apply", "--split", "oof")
    params = read_params()
    assert params.ensemble.threshold == 0.4
    assert params.ensemble.folds is None
    assert params.ensemble.merge == "probability"


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
    put(project, cars=10, holdout={"refused": refused})
    run("--best")
    assert refused in capsys.readouterr().out
    run("--apply")
    assert "Out of fold" in capsys.readouterr().out
    assert read_params().ensemble.folds is None


def test_with_too_few_cars_nothing_is_applied(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(project, cars=4)
    text = (project / "params.yaml").read_text()
    run("--best")
    assert "4 cars can't tell how sure a difference is" in capsys.readouterr().out
    run("--apply", status=1)
    assert "Nothing to apply. 4 cars can't tell" in capsys.readouterr().err
    assert (project / "params.yaml").read_text() == text


def test_without_an_ablation(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(project / "reports")
    for option in ("--best", "--apply"):
        run(option, status=1)
        assert "run 'dvc repro ablate', which makes it" in capsys.readouterr().err
