"""Killed at any moment, the pipeline ends with the same bytes."""

import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest

from tests.end_to_end.dvc_project import TINY, Project, kill_when


def bytes_of(project: Path) -> dict[str, bytes]:
    names = [f"folds/small/{fold}/model.safetensors" for fold in (0, 1)]
    return {name: (project / name).read_bytes() for name in (*names, "submissions/submission.csv.gz")}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["group", *(pytest.param(how, marks=pytest.mark.long) for how in ("process", "dvc"))])
def test_killed_anywhere_the_same_submission(
    finished_project: Path, tiny_sample: Path, tmp_path: Path, how: str
) -> None:
    project = Project(tmp_path / "project", TINY | {"data.directory": str(tiny_sample)})
    resume = project.folder / ".resume"

    def there(pattern: str) -> bool:
        return any(resume.glob(pattern))

    shard = "predict/test/small/0/*/unfinished/maps/shard-00000.parquet"
    points = [
        ("train", lambda: there("train/small/0/*/unfinished/last.ckpt")),
        ("train", lambda: there("train/small/1/*/unfinished")),
        ("predict", lambda: there(shard)),
        ("evaluate", lambda: True),
        ("ensemble", lambda: there("ensemble/*/unfinished/part-*")),
    ]
    for stage, ready in points:
        dvc = project.start("dvc", "repro")
        process = kill_when(dvc, stage, ready, how)
        assert dvc.returncode != 0
        if stage == "predict":
            finished = {path: path.stat().st_mtime_ns for path in resume.glob(shard)}
        if how == "dvc":
            # Its child lives on, and the next run must neither disturb it nor be disturbed by it.
            assert process.is_running()
    project.repro()
    assert bytes_of(project.folder) == bytes_of(finished_project)
    assert not list(project.folder.rglob(".*.part")), "a kill left something half written"
    for path, moment in finished.items():
        kept = path.parents[2] / "result" / path.name
        assert kept.stat().st_mtime_ns == moment, "a finished shard was made again"


@pytest.mark.slow
def test_two_runs_of_a_stage_share_one_state(finished_project: Path, tmp_path: Path) -> None:
    project = Project.copy_of(finished_project, tmp_path / "project")
    project.put({"train.epochs": 2})
    earlier = list(project.folder.glob(".resume/train/small/0/*/result"))
    command = ("carvana", "stage", "train", "--model", "small", "--fold", "0")
    both = [
        subprocess.Popen(command, cwd=project.folder, env=project.environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert sum("train small 0" in text for text in printed) == 1
    assert len(list(project.folder.glob(".resume/train/small/0/*/result"))) == len(earlier) + 1


@pytest.mark.slow
def test_a_stage_left_by_a_killed_dvc_does_not_publish_over_newer_settings(
    finished_project: Path, tmp_path: Path
) -> None:
    project = Project.copy_of(finished_project, tmp_path / "project")
    project.put({"train.epochs": 15})
    command = ("carvana", "stage", "train", "--model", "small", "--fold", "0")
    orphan = subprocess.Popen(command, cwd=project.folder, env=project.environment, stderr=subprocess.DEVNULL)
    while orphan.poll() is None and not any(project.folder.glob(".resume/train/small/0/*/unfinished")):
        time.sleep(0.05)
    project.put({"train.lr": 0.02, "train.epochs": 1})
    assert "train small 0" in project.run(*command)
    assert orphan.wait() == 0
    curves = pd.read_csv(project.folder / "folds/small/0/curves.csv")
    assert curves["epoch"].max() == 1
