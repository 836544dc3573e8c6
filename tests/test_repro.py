"""``carvana repro``: what it checks before DVC works, and the environment that it gives DVC."""

import getpass
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ModelSettings, Params, SmpUNetConfig, read_params
from pipeline.data.fold_assignment import read_folds
from pipeline.errors import CarvanaError
from pipeline.kaggle.ledger import Ledger
from pipeline.repro import check_dvc_lock, check_nets, check_outputs, dvc_environment
from tests import ROOT

CONFLICT = "a: 1\n<<<<<<< HEAD\nb: 1\n=======\nb: 2\n>>>>>>> other\n"
DVC_YAML = """\
stages:
  train:
    outs: ["folds/${item.model}/${item.fold}"]
  report:
    outs: [reports/index.html]
    metrics:
      - reports/metrics.json: {cache: false}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "dvc.yaml").write_text(DVC_YAML)
    return tmp_path


@pytest.mark.parametrize("link", ["folds", "reports", "reports/index.html"])
def test_an_output_that_is_a_link_is_refused(project: Path, link: str) -> None:
    (project / "elsewhere").mkdir()
    (project / link).parent.mkdir(exist_ok=True)
    (project / link).symlink_to(project / "elsewhere")
    with pytest.raises(CarvanaError, match=link):
        check_outputs(project)


def test_an_output_in_git_is_refused_but_not_a_metric(project: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", *arguments], cwd=project, check=True, capture_output=True)

    (project / "reports").mkdir()
    (project / "reports" / "metrics.json").write_text("{}")
    git("init", "-q")
    git("add", ".")
    check_outputs(project)
    (project / "reports" / "index.html").write_text("")
    git("add", ".")
    with pytest.raises(CarvanaError, match=r"reports/index\.html"):
        check_outputs(project)


def test_a_project_outside_git_has_no_tracked_outputs(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(project.parent))
    (project / "reports").mkdir()
    (project / "reports" / "index.html").write_text("")
    check_outputs(project)


def test_a_merge_conflict_is_named_with_its_line(tmp_path: Path) -> None:
    for name, read in (
        ("dvc.lock", lambda path: check_dvc_lock(path.parent)),
        ("params.yaml", read_params),
        ("folds.csv", read_folds),
        ("ledger.csv", lambda path: Ledger(path).rows()),
    ):
        path = tmp_path / name
        path.write_text(CONFLICT)
        with pytest.raises(CarvanaError, match=rf"{name}, line 2.*conflict"):
            read(path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"encoder": "resnet1"}, "'resnet1'"),
        ({"encoder_weights": "gone.pth"}, r"gone\.pth"),
        ({"encoder": "tu-swin_tiny_patch4_window7_224"}, "training"),
        ({"options": {"width": 3}}, "'width'"),
    ],
)
def test_an_encoder_that_does_not_fit_is_named_before_data_are_provided(changes: dict[str, Any], named: str) -> None:
    def params(**changed: Any) -> Params:
        spec = SmpUNetConfig(architecture="smp_unet", encoder="resnet18").model_copy(update=changed)
        return read_params(ROOT / "params.yaml").model_copy(
            update={"models": ModelSettings(active=("net",), specs={"net": spec})}
        )

    check_nets(params())
    with pytest.raises(CarvanaError, match=named):
        check_nets(params(**changes))


def test_stages_are_run_by_this_interpreters_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    assert dvc_environment()["PATH"] == os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin"])


def test_a_user_without_a_name_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    assert "LOGNAME" not in dvc_environment() or "LOGNAME" in os.environ
    monkeypatch.setattr(getpass, "getuser", unknown)
    assert dvc_environment()["LOGNAME"] == str(os.getuid())


@pytest.mark.parametrize("command", [["summary"], ["submissions"], ["tensorboard"], ["clean"], ["stage", "folds"]])
def test_a_command_outside_the_project_names_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    from pipeline.cli import main

    (tmp_path / "params.yaml").write_text("")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    with pytest.raises(SystemExit) as left:
        main(command)
    assert left.value.code == 1
    assert f"Run this in {tmp_path}." in capsys.readouterr().err


def test_output_to_an_ascii_terminal_has_replacement_characters() -> None:
    code = "import sys; from pipeline import cli; cli._recipe_names; cli.main(['recipe', '--help'])"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert (run.returncode, run.stderr) == (0, "")
