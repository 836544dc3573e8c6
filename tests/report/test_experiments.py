"""DVC experiments compared with the workspace: paired images, other fold assignments, unfinished experiments."""

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.ablation.bootstrap import studentized_ci
from pipeline.ablation.run_comparison import COMPARISON_COLUMNS, ScoredRun, compare_runs
from pipeline.ablation.search_space import EnsembleConfig
from pipeline.config import ScoredSplit
from pipeline.errors import CarvanaError
from pipeline.report.experiments import TABLE, compare, print_experiments, show_experiments
from pipeline.workspace import dvc_stages
from tests import ROOT
from tests.end_to_end.dvc_project import Project

CARS = [f"{number:012d}" for number in range(12)]


def setting(models: Sequence[str], folds: Sequence[int]) -> EnsembleConfig:
    return EnsembleConfig(tuple(models), tuple(folds), ("identity",), "mean_probability", (1,) * len(models), 0.5)


def scored(split: ScoredSplit, dice_by_car: Mapping[str, Sequence[float]], model: str, fold: int) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"split": split, "model": model, "fold": fold, "image_id": f"{car}_{n:02}", "car": car, "dice": dice}
            for car, values in dice_by_car.items()
            for n, dice in enumerate(values, 1)
        ]
    )


def run(name: str, *frames: pd.DataFrame, models: Sequence[str] = ("small",), changed: str = "") -> ScoredRun:
    settings: dict[ScoredSplit, EnsembleConfig] = {"oof": setting(models, ()), "holdout": setting(models, (0, 1))}
    return ScoredRun(name, changed, settings, pd.concat(frames, ignore_index=True))


def drawn(seed: int, cars: Sequence[str] = CARS, images: int = 4) -> dict[str, list[float]]:
    random = np.random.default_rng(seed)
    return {car: (0.98 + 0.01 * random.random(images)).round(6).tolist() for car in cars}


class TestPairs:
    def test_each_image_is_paired_with_itself(self) -> None:
        here, there = drawn(0), drawn(1)
        shuffled = scored("oof", there, "small", 0).sample(frac=1, random_state=0)
        found = compare_runs(run("workspace", scored("oof", here, "small", 0)), [run("other", shuffled)])
        assert list(found.table) == list(COMPARISON_COLUMNS)
        assert not found.notes
        row = found.table.set_index("name").loc["other"]
        difference = np.array([there[car] for car in CARS]) - np.array([here[car] for car in CARS])
        assert row["difference"] == pytest.approx(difference.mean())
        assert row["dice"] == pytest.approx(np.mean([there[car] for car in CARS]))
        assert (row["better"], row["worse"]) == ((difference > 0).sum(), (difference < 0).sum())
        bounds = studentized_ci(difference.sum(axis=1)[:, None], np.full(12, 4))[0]
        assert (row["low"], row["high"]) == pytest.approx(tuple(bounds))
        assert (row["images"], row["cars"], row["passes"]) == (48, 12, 1)

    def test_the_best_comes_first_in_each_split(self) -> None:
        values = {
            name: {car: [dice] for car in CARS} for name, dice in {"good": 0.99, "here": 0.98, "bad": 0.97}.items()
        }
        runs = {
            name: run(name, scored("oof", dice, "small", 0), scored("holdout", {"h": dice[CARS[0]]}, "ensemble", -1))
            for name, dice in values.items()
        }
        table = compare_runs(runs["here"], [runs["bad"], runs["good"]]).table
        assert table["split"].tolist() == ["oof"] * 3 + ["holdout"] * 3
        assert table["name"].tolist() == ["good", "here", "bad"] * 2
        assert table["current"].tolist() == [False, True, False] * 2
        assert table["folds"].tolist() == [""] * 3 + ["0 1"] * 3

    def test_only_common_images_are_compared(self) -> None:
        here, there = drawn(0), drawn(1, CARS[3:])
        found = compare_runs(
            run("workspace", scored("oof", here, "small", 0)), [run("fewer", scored("oof", there, "small", 0))]
        )
        row = found.table.set_index("name").loc["fewer"]
        difference = np.array([there[car] for car in CARS[3:]]) - np.array([here[car] for car in CARS[3:]])
        assert row["difference"] == pytest.approx(difference.mean())
        assert (row["images"], row["cars"]) == (36, 9)
        (note,) = found.notes
        assert note.startswith("fewer, ")
        assert "36" in note and "48" in note

    def test_too_few_cars_have_no_interval(self, capsys: pytest.CaptureFixture[str]) -> None:
        cars = CARS[:7]
        here, there = (scored("oof", drawn(seed, cars), "small", 0) for seed in (0, 1))
        found = compare_runs(run("workspace", here), [run("other", there)])
        assert found.table[["low", "high"]].isna().all(axis=None)
        (note,) = found.notes
        assert "7 cars" in note
        print_experiments(found)
        assert "95 % CI" not in capsys.readouterr().out

    def test_other_fold_assignments_are_compared_on_common_images(self) -> None:
        """A car that is held out in one run and a validation car in the other is not compared."""
        here = run(
            "workspace",
            scored("oof", drawn(0, CARS[:9]), "small", 0),
            scored("holdout", drawn(0, CARS[9:]), "ensemble", -1),
        )
        there = run(
            "other-folds",
            scored("oof", drawn(1, CARS[1:10]), "small", 1),
            scored("holdout", drawn(1, [CARS[0], *CARS[10:]]), "ensemble", -1),
        )
        found = compare_runs(here, [there])
        rows = found.table[found.table["name"] == "other-folds"].set_index("split")
        assert rows["cars"].to_dict() == {"oof": 8, "holdout": 2}
        assert sum(note.startswith("other-folds: ") for note in found.notes) == 1

    def test_without_common_held_out_cars_there_is_no_row(self, capsys: pytest.CaptureFixture[str]) -> None:
        oof = scored("oof", drawn(0), "small", 0)
        here = run("workspace", oof, scored("holdout", drawn(0, ["held"]), "ensemble", -1))
        found = compare_runs(here, [run("all", oof)])
        assert found.table.groupby("split")["name"].agg(list).to_dict() == {
            "oof": ["workspace", "all"],
            "holdout": ["workspace"],
        }
        assert any(note.startswith("all, ") for note in found.notes)
        print_experiments(found)
        assert "Held-out" not in capsys.readouterr().out

    def test_several_models_are_scored_merged(self) -> None:
        here = run("workspace", scored("oof", {car: [0.98] for car in CARS}, "small", 0))
        parts = {"small": 0.98, "large": 0.5, "ensemble": 0.99}
        frames = [scored("oof", {car: [dice] for car in CARS}, model, 0) for model, dice in parts.items()]
        table = compare_runs(here, [run("two", *frames, models=("small", "large"))]).table.set_index("name")
        assert table.loc["two", "difference"] == pytest.approx(0.01)
        assert table.loc["two", "passes"] == 2
        only = compare_runs(here, [run("one", *frames)]).table.set_index("name")
        assert only.loc["one", "difference"] == 0

    def test_all_changes_are_printed(self, capsys: pytest.CaptureFixture[str]) -> None:
        changes = [f"train.augment.number{n}=0.{n}" for n in range(12)]
        here = run("workspace", scored("oof", drawn(0), "small", 0))
        found = compare_runs(here, [run("abuzz-chip", scored("oof", drawn(1), "small", 0), changed=" ".join(changes))])
        print_experiments(found)
        assert [word for word in capsys.readouterr().out.split() if "=" in word] == changes


SETTINGS = """\
data: {source: sample}
folds: {count: 2, active: [0], holdout_cars: 2}
models: {active: [small], specs: {small: {architecture: unet}, large: {architecture: unet, widths: [8]}}}
train: {epochs: 2, lr: 0.01}
predict: {tta: {test: [identity, hflip]}}
ensemble: {models: null, folds: null, weights: {}, merge: mean_probability, threshold: 0.5}
"""

STAGES = """\
stages:
  train:
    matrix: {model: "${models.active}", fold: "${folds.active}"}
    cmd: python score.py train ${item.model}/${item.fold}
    params: [train, "models.specs.${item.model}"]
    outs: ["folds/${item.model}/${item.fold}"]
  predict:
    matrix: {model: "${models.active}", fold: "${folds.active}", split: [oof]}
    cmd: python score.py predict ${item.model}/${item.fold}
    deps: ["folds/${item.model}/${item.fold}"]
    outs: ["predictions/${item.split}/${item.model}/${item.fold}"]
  evaluate:
    cmd: python score.py evaluate
    params: [ensemble, folds.active, folds.holdout_cars, models.active, predict.tta.test]
    deps: [predictions/oof]
    outs: [reports/images.csv]
"""
# Named as the real ones, which are compared with what is read of them below.

SCRIPT = """\
import sys
from pathlib import Path

stage, *net = sys.argv[1:]
if stage == "train":
    epochs = int(Path("params.yaml").read_text().split("epochs: ")[1].split(",")[0])
    if epochs < 0:
        sys.exit("no epochs")
    Path("folds", *net).parent.mkdir(parents=True, exist_ok=True)
    Path("folds", *net).write_text(str(epochs))
elif stage == "predict":
    Path("predictions/oof", *net).parent.mkdir(parents=True, exist_ok=True)
    Path("predictions/oof", *net).write_text(Path("folds", *net).read_text())
else:
    epochs = max(int(path.read_text()) for path in Path("predictions/oof").glob("*/0"))
    rows = ["split,model,fold,image_id,car,angle,dice"]
    for number in range(12):
        split, fold = ("holdout", -1) if number > 9 else ("oof", 0)
        for model in ["ensemble"] if fold < 0 else ["small", "large"]:
            dice = 0.9 + epochs / 1000 + number / 10000
            rows += [f"{split},{model},{fold},{number:012}_{a:02},{number:012},{a},{dice:.6f}" for a in range(1, 5)]
    Path("reports").mkdir(exist_ok=True)
    Path("reports/images.csv").write_text("\\n".join(rows) + "\\n")
"""


class Small(Project):
    """A project of two stages that train nothing, under git and DVC, run once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / ".dvc").mkdir(parents=True)
        for name, text in {
            ".dvc/config": "[core]\n    analytics = false\n",
            ".gitignore": "/reports/\n/folds/\n/predictions/\n/.dvc/tmp/\n/.dvc/cache/\n",
            "params.yaml": SETTINGS,
            "dvc.yaml": STAGES,
            "score.py": SCRIPT,
        }.items():
            (folder / name).write_text(text)
        self.git("init", "--quiet")
        self.commit()

    def try_out(self, name: str, *arguments: str) -> None:
        self.run("dvc", "exp", "run", "--quiet", "--name", name, *arguments)

    def state(self) -> tuple[str, bytes]:
        shown = subprocess.run(
            ["git", "status", "--short"], cwd=self.folder, capture_output=True, text=True, check=True
        )
        return shown.stdout, (self.folder / "reports/images.csv").read_bytes()


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    project = Small(tmp_path / "project")
    project.repro("--quiet")
    project.commit()
    monkeypatch.chdir(project.folder)
    return project


def test_the_real_stages_note_what_is_read() -> None:
    stages = dvc_stages(ROOT)
    assert {"ensemble", "folds.active", "models.active", "predict.tta.test"} <= set(stages["evaluate"]["params"])
    assert "reports/images.csv" in stages["evaluate"]["outs"]
    assert list(stages["train"]["matrix"]) == ["model", "fold"]
    assert list(stages["predict"]["matrix"]) == ["model", "fold", "split"]


@pytest.mark.slow
class TestExperiments:
    def test_experiments_are_compared_without_checkout(self, small: Small, capsys: pytest.CaptureFixture[str]) -> None:
        small.try_out("more", "--temp", "--set-param", "train.epochs=4")
        before = small.state()
        show_experiments()
        assert small.state() == before
        table = pd.read_csv(TABLE).set_index(["split", "name"])
        assert table.loc[("oof", "more"), "changed"] == "train.epochs=4"
        assert table.loc[("oof", "more"), "difference"] == pytest.approx(0.002)
        assert table.loc[("oof", "more"), ["low", "high"]].tolist() == pytest.approx([0.002, 0.002])
        assert table.loc[("holdout", "more"), ["images", "cars", "passes"]].tolist() == [8, 2, 2]
        printed = capsys.readouterr().out
        (row,) = (line.split() for line in printed.splitlines() if line.startswith("more ") and " to " in line)
        assert row[1:6] == ["0.90445", "+0.00200", "+0.00200", "to", "+0.00200"]
        assert "2 cars" in printed
        assert "train.seed" in printed
        # They outlive the commit that they were tried on.
        small.put({"train.epochs": 3})
        small.repro("--quiet")
        small.commit()
        table = compare().table.set_index(["split", "name"])
        assert table.loc[("oof", "more"), "difference"] == pytest.approx(0.001)

    def test_one_in_the_workspace_is_compared_with_the_commit(self, small: Small) -> None:
        small.try_out("here", "--set-param", "models.active=[large]", "--set-param", "train.epochs=1")
        table = compare().table.set_index(["split", "name"])
        assert table.loc["oof", "changed"].to_dict() == {
            "workspace": "",
            "here": "",
            "HEAD": "models.active=[small] train.epochs=2",
        }
        assert table.loc[("oof", "workspace"), "models"] == "large"

    def test_experiments_without_scores_are_noted(self, small: Small) -> None:
        small.try_out("part", "--temp", "--set-param", "train.epochs=5", "train")
        small.try_out("maps", "--temp", "--set-param", "train.epochs=7", "predict")
        small.try_out("lost", "--temp", "--set-param", "train.epochs=6")
        for file in (small.folder / ".dvc/cache").rglob("*"):
            if file.is_file() and b"0.906" in file.read_bytes():
                file.chmod(0o600)
                file.unlink()
        found = compare()
        assert set(found.table["name"]) == {"workspace"}
        for name in ("part", "maps", "lost"):
            assert any(note.startswith(f"{name} ") for note in found.notes)

    @pytest.mark.long
    def test_queued_and_failed_experiments_are_noted(self, small: Small) -> None:
        small.try_out("good", "--queue", "--set-param", "train.epochs=4")
        small.try_out("bad", "--queue", "--set-param", "train.epochs=-1")
        queued = "is queued; 'dvc exp run --run-all' runs it."
        assert {f"good {queued}", f"bad {queued}"} <= set(compare().notes)
        small.run("dvc", "exp", "run", "--run-all", "--jobs", "1")
        found = compare()
        assert set(found.table["name"]) == {"workspace", "good"}
        assert "bad failed; 'dvc queue logs bad' shows why." in found.notes

    def test_without_experiments_a_command_is_suggested(self, small: Small) -> None:
        found = compare()
        assert found.table["current"].all()
        (note,) = found.notes
        assert "dvc exp run --temp --set-param train.epochs=20" in note

    def test_scores_of_another_state_are_refused(self, small: Small) -> None:
        small.put({"train.epochs": 3})
        small.repro("--quiet", "train")
        with pytest.raises(CarvanaError, match="'dvc repro' first"):
            compare()
        small.repro("--quiet", "predict")
        with pytest.raises(CarvanaError, match=r"images\.csv"):
            compare()
        (small.folder / "reports/images.csv").unlink()
        with pytest.raises(CarvanaError, match=r"images\.csv"):
            compare()
