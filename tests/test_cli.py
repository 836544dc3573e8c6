"""Commands: their output, exit status and error messages."""

import errno
import importlib
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from ruamel.yaml import YAML

from pipeline import repro
from pipeline.cli import main
from pipeline.competition.image_ids import format_image_id
from pipeline.config import read_params
from pipeline.errors import CarvanaError, report_errors
from pipeline.report import summary
from pipeline.stages import download
from pipeline.utils.run_state import acquire_run_state
from tests import ROOT

IDS = [format_image_id("00087a6bd4dc", angle) for angle in (1, 2, 3)]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project without data, as the working folder."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def carvana(project: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command, and return its exit status and what it printed."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(arguments)
        printed = capfd.readouterr()
        assert "Traceback" not in printed.err
        return int(end.value.code or 0), printed.out, printed.err

    return run


def write_csv(name: str, masks: dict[str, str]) -> str:
    rows = "".join(f"{image_id}.jpg,{text}\n" for image_id, text in masks.items())
    Path(name).write_text(f"img,rle_mask\n{rows}")
    return name


def add_data(project: Path) -> None:
    """Add data whose test images are IDS."""
    (project / "data").mkdir()
    (project / "data" / "manifest.json").write_text("{}")
    (project / "data" / "sample_submission.csv").write_text(
        "img,rle_mask\n" + "".join(f"{image_id}.jpg,1 1\n" for image_id in IDS)
    )
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("directory: null", "directory: data"))


# ---------------------------------------------------------------- check and score


def test_check_of_a_valid_csv(carvana: Run) -> None:
    name = write_csv("a.csv", {IDS[0]: "1 245504", IDS[1]: ""})
    status, out, err = carvana("check", name)
    assert status == 0
    assert err.startswith("warning: 1 of 2 masks ")
    assert "a.csv is valid: 2 images" in out
    assert "not checked" in out
    assert "0.0% to 10.0%, 5.0% on average" in out


def test_check_compares_image_ids_with_the_manifest(carvana: Run, project: Path) -> None:
    add_data(project)
    assert carvana("check", write_csv("a.csv", dict.fromkeys(IDS, "1 5")))[0] == 0
    status, _, err = carvana("check", write_csv("b.csv", dict.fromkeys(IDS[:2], "1 5")))
    assert status == 1
    assert err.startswith("error: b.csv ") and f"{IDS[2]}.jpg" in err


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("source", ["kaggle", "sample"])
def test_check_needs_no_data(carvana: Run, project: Path, source: str, manifest: bool) -> None:
    if manifest:
        add_data(project)
        shutil.copy(ROOT / "params.yaml", project)
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("source: sample", f"source: {source}"))
    assert carvana("check", write_csv("a.csv", {IDS[0]: "1 5"}))[0] == 0


@pytest.mark.parametrize(
    ("text", "part"),
    [("1 5 7", "3"), ("1 5 3 2", "'3 2'"), ("9 1 1 1", "'1 1'"), ("2455040 2", "'2455040 2'"), ("1 x", "'x'")],
)
def test_check_names_the_file_the_row_and_the_image(carvana: Run, text: str, part: str) -> None:
    status, out, err = carvana("check", write_csv("a.csv", {IDS[0]: "1 5", IDS[1]: text}))
    assert (status, out) == (1, "")
    assert err.startswith(f"error: a.csv, row 3 ({IDS[1]}.jpg): ")
    assert part in err
    assert err.count("\n") == 1


def test_check_of_a_file_that_is_not_there(carvana: Run) -> None:
    status, out, err = carvana("check", "none.csv")
    assert (status, out) == (1, "")
    assert err.startswith("error: none.csv ")


def test_score(carvana: Run) -> None:
    truth = write_csv("truth.csv", {IDS[0]: "1 10", IDS[1]: "1 10", IDS[2]: ""})
    name = write_csv("a.csv", {IDS[2]: "", IDS[1]: "6 10", IDS[0]: "1 10"})
    status, out, err = carvana("score", name, "--truth", truth)
    assert (status, err) == (0, "")
    assert out.startswith(f"Dice {(1 + 1 + 0.5) / 3:.6f}  IoU {(1 + 1 + 1 / 3) / 3:.6f}  accuracy 0.99999")
    assert f"3 images; the worst is {IDS[1]} with 0.500000" in out


def test_score_of_other_images(carvana: Run) -> None:
    truth = write_csv("truth.csv", {IDS[0]: "1 10"})
    status, out, err = carvana("score", write_csv("a.csv", {IDS[1]: "1 10"}), "--truth", truth)
    assert (status, out) == (1, "")
    assert err.startswith(f"error: a.csv, row 2 ({IDS[1]}.jpg): truth.csv ")


@pytest.mark.parametrize("arguments", [["--debug", "check", "none.csv"], ["check", "none.csv", "--debug"]])
def test_debug_lets_the_traceback_through(project: Path, arguments: list[str]) -> None:
    with pytest.raises(CarvanaError, match=r"none\.csv"):
        main(arguments)


@pytest.mark.parametrize("arguments", [[], ["chek"], ["submit"], ["score", "a.csv"], ["check", "a.csv", "--deep"]])
def test_a_wrong_command_gets_the_usage(carvana: Run, arguments: list[str]) -> None:
    status, out, err = carvana(*arguments)
    assert status == 2
    assert "Usage: carvana" in out + err


def test_the_installed_command(project: Path) -> None:
    """Run in a process of its own."""
    name = write_csv("a.csv", {IDS[0]: "1 5 7"})
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", "check", name]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith(f"error: a.csv, row 2 ({IDS[0]}.jpg): ")
    assert "Traceback" not in run.stderr


# ---------------------------------------------------------------- repro and summary


@pytest.fixture
def dvc(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replace DVC by a fake that records its calls and succeeds."""
    calls: list[list[str]] = []

    def run(command: list[str], check: bool, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(repro.subprocess, "run", run)
    monkeypatch.setattr(summary, "show_summary", lambda: None)
    monkeypatch.setattr(repro, "check_outputs", lambda project: None)
    monkeypatch.setattr(repro, "provide_data", lambda settings, root: calls.append([f"provide {settings.source}"]))
    return calls


COMPLETE_LOCK = """\
schema: '2.0'
stages:
  folds:
    cmd: carvana stage folds
    deps:
    - path: pipeline/stages/folds.py
      hash: md5
      md5: 68f0e3f1e4d6cbd0e2d6e3d3a0b4a0c5
      size: 640
    params:
      params.yaml:
        folds.count: 3
        folds.seed: 0
    outs:
    - path: folds/folds.csv
      hash: md5
      md5: 3c9cf4c5a2c7f9a6d6ba6ba8c7a9d7f1
      size: 229
"""


def test_repro_passes_its_arguments_to_dvc(carvana: Run, project: Path, dvc: list[list[str]]) -> None:
    (project / "dvc.lock").write_text(COMPLETE_LOCK)
    (project / ".dvc" / "tmp").mkdir(parents=True)
    (project / ".dvc" / "tmp" / "rwlock").write_text("")
    for arguments in ([], ["-f"], ["-f", "train"], ["train", "--single-item"]):
        assert carvana("repro", *arguments)[0] == 0
        assert dvc[-1] == [sys.executable, "-m", "dvc", "repro", *arguments]


@pytest.mark.parametrize(
    "truncated",
    [
        "",
        COMPLETE_LOCK[:-3],
        COMPLETE_LOCK[:70],
        "schema: '2.0'\nstages:\n  folds:\n",
        COMPLETE_LOCK + "\tx",
        "\0" * 50,
    ],
)
def test_repro_with_a_truncated_dvc_lock(carvana: Run, project: Path, dvc: list[list[str]], truncated: str) -> None:
    (project / "dvc.lock").write_text(truncated)
    status, _, err = carvana("repro")
    assert status == 1
    assert "dvc.lock" in err
    assert "git checkout dvc.lock" in err
    assert err.count("\n") == 1
    assert dvc == []


def test_dvc_lock_truncated_at_any_byte(tmp_path: Path) -> None:
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA

    lock = tmp_path / "dvc.lock"
    for end in range(len(COMPLETE_LOCK)):
        lock.write_text(COMPLETE_LOCK[:end])
        try:
            repro.check_dvc_lock(tmp_path)
        except CarvanaError:
            continue
        COMPILED_LOCKFILE_SCHEMA(YAML(typ="safe").load(lock))
    lock.write_text(COMPLETE_LOCK)
    repro.check_dvc_lock(tmp_path)


def test_repro_with_a_truncated_rwlock(carvana: Run, project: Path, dvc: list[list[str]]) -> None:
    rwlock = project / ".dvc" / "tmp" / "rwlock"
    rwlock.parent.mkdir(parents=True)
    rwlock.write_text('{"/a/b": {"write": {"pi')
    status, _, err = carvana("repro")
    assert status == 1
    assert str(rwlock) in err
    assert dvc == []


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [([], True), (["-f"], True), (["folds"], False), (["--dry"], False), (["-s", "folds"], False)],
)
def test_repro_shows_the_scores_of_whole_runs_only(
    carvana: Run, dvc: list[list[str]], monkeypatch: pytest.MonkeyPatch, arguments: list[str], shown: bool
) -> None:
    monkeypatch.setattr(summary, "show_summary", lambda: print("scores"))
    assert carvana("repro", *arguments)[:2] == (0, "scores\n" if shown else "")


def test_debug_of_repro_is_not_for_dvc(project: Path, dvc: list[list[str]]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["repro", "--debug", "-f"])
    assert left.value.code == 0
    assert dvc[-1] == [sys.executable, "-m", "dvc", "repro", "-f"]
    (project / "params.yaml").write_text("trian: {}")
    with pytest.raises(CarvanaError, match="trian"):
        main(["repro", "--debug"])


def test_repro_validates_settings_first(carvana: Run, project: Path, dvc: list[list[str]]) -> None:
    (project / "params.yaml").write_text("trian: {}")
    status, _, err = carvana("repro")
    assert status == 1
    assert "Unknown setting trian" in err
    assert dvc == []


def test_repro_provides_the_data_before_dvc_starts(carvana: Run, dvc: list[list[str]]) -> None:
    assert carvana("repro")[0] == 0
    assert [call[0] for call in dvc] == ["provide sample", sys.executable]


def test_repro_reports_the_failure_of_dvc(carvana: Run, dvc: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repro.subprocess, "run", lambda command, check, env: subprocess.CompletedProcess(command, 255))
    status, _, err = carvana("repro")
    assert (status, err.count("\n")) == (1, 1)
    assert "dvc repro failed" in err


def test_help_of_repro_is_shown_and_nothing_run(carvana: Run, dvc: list[list[str]]) -> None:
    status, out, _ = carvana("repro", "--help")
    assert (status, dvc) == (0, [])
    assert "Usage: carvana repro" in out


def test_summary_without_a_run(carvana: Run) -> None:
    status, _, err = carvana("summary")
    assert status == 1
    assert "reports/evaluation.json" in err


# ---------------------------------------------------------------- recipe and clean


def test_recipe_lists_applies_and_prints_changes(carvana: Run, project: Path) -> None:
    status, out, _ = carvana("recipe")
    assert status == 0
    assert "one GPU" in out
    status, out, _ = carvana("recipe", "carvana")
    assert status == 0
    assert "hardware.device: auto -> gpu" in out
    assert carvana("recipe", "carvana") == (0, "Nothing changed.\n", "")


def test_an_unknown_recipe(carvana: Run, project: Path) -> None:
    before = (project / "params.yaml").read_bytes()
    status, _, err = carvana("recipe", "none")
    assert status == 1
    assert "'none'" in err and "carvana" in err
    assert (project / "params.yaml").read_bytes() == before


def test_clean_lists_and_removes_when_told_to(carvana: Run, project: Path) -> None:
    with acquire_run_state(project, "train/unet/0", {"n": 1}) as state:
        (state.work_dir / "checkpoint").write_bytes(b"x" * 2_000_000)
    status, out, _ = carvana("clean")
    assert status == 0
    assert "2.0  .resume/train/unet/0/" in out
    assert state.work_dir.exists()
    status, out, _ = carvana("clean", "--yes")
    assert status == 0
    assert "Deleted." in out
    assert not state.folder.exists()


def test_clean_refuses_while_a_run_is_working(carvana: Run, project: Path) -> None:
    with acquire_run_state(project, "train/unet/0", {"n": 1}) as state:
        status, _, err = carvana("clean", "--yes")
        assert state.work_dir.exists()
    assert status == 1
    assert "A run is working on .resume/train/unet/0/" in err


# ---------------------------------------------------------------- error messages


def raising(error: BaseException) -> Callable[[], object]:
    def call() -> object:
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (CarvanaError("a.jpg is bad. Fix it."), ["a.jpg is bad. Fix it.\n"]),
        (OSError(errno.ENOSPC, "No space left on device"), ["disk is full", "No space left on device"]),
        (MemoryError("12 GB"), ["memory", "12 GB", "train.batch_size", "hardware.predict_batch", "hardware.cache_gb"]),
        (RuntimeError("first line\nsecond line"), ["RuntimeError: first line second line", "--debug"]),
    ],
)
def test_an_error_is_printed_as_one_line(capfd: pytest.CaptureFixture[str], error: Exception, parts: list[str]) -> None:
    assert report_errors(raising(error), debug=False) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert all(part in err for part in parts)
    with pytest.raises(type(error)):
        report_errors(raising(error), debug=True)


def test_a_full_disk_reported_by_any_library(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert report_errors(raising(RuntimeError("PytorchStreamWriter failed writing file")), debug=False) == 1
    assert capfd.readouterr().err.startswith("error: The disk is full (PytorchStreamWriter failed writing file)")


def test_ctrl_c_exits_with_130(capfd: pytest.CaptureFixture[str]) -> None:
    assert report_errors(raising(KeyboardInterrupt()), debug=False) == 130
    assert capfd.readouterr().err.count("\n") == 1


def test_a_stage_whose_disk_is_full_says_so(
    project: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All the way through a stage's own run, as ``carvana stage download`` takes it."""

    def fill_up(target: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    part = SimpleNamespace(ignored=list)
    monkeypatch.setattr(download, "provide_data", lambda settings, root: SimpleNamespace(train=part, test=part))
    monkeypatch.setattr(download, "build_manifest", lambda source, on_corrupt: {"suspect_test_images": {}})
    monkeypatch.setattr(download, "write_truth", lambda source, target: None)
    monkeypatch.setattr(download, "write_json", fill_up)
    with pytest.raises(SystemExit) as end:
        main(["stage", "download"])
    assert end.value.code == 1
    err = capfd.readouterr().err
    assert err.startswith("error: The disk is full (")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("folds", "data/manifest.json"),
        ("ensemble", "predictions/test/small/0"),
        ("report", "evaluation.json"),
    ],
)
def test_a_stage_run_too_early_says_what_to_run_first(
    project: Path, capfd: pytest.CaptureFixture[str], name: str, missing: str
) -> None:
    add_data(project)
    (project / "data" / "manifest.json").unlink()
    module = importlib.import_module(f"pipeline.stages.{name}")
    assert report_errors(lambda: module.run(read_params()), debug=False) == 1
    err = capfd.readouterr().err
    assert missing in err
    assert "dvc repro" in err


def test_an_old_command_names_the_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["predict", "car.jpg"])
    assert left.value.code == 2
    assert "carvana segment" in capsys.readouterr().err


def test_a_stage_runs_through_the_program(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["stage", "train", "--model", "no-such", "--fold", "0"])
    assert left.value.code == 1
    assert "no-such" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["stage", "train", "--help"])
    assert left.value.code == 0
    assert "--model" in capsys.readouterr().out
