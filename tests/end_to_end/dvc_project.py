"""A copy of the project in a folder of its own, as a user has it after a clone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML

from tests import ROOT

FILES = ("pipeline", "recipes", "dvc.yaml", "params.yaml", ".dvcignore", ".gitignore")
TINY = {
    "folds.count": 2,
    "folds.active": [0, 1],
    "folds.holdout_cars": 2,
    "input.size": [64, 96],
    "models.specs.small.widths": [4, 8, 8],
    "models.specs.small.dropout": 0.2,
    "train.epochs": 3,
    "train.validate_every": 1,
    "predict.shard_images": 4,
    "hardware.device": "cpu",
}
"""Settings of a run of seconds on the tiny sample."""


class Project:
    """The project's files in ``folder``, under git and DVC, with settings of its own."""

    def __init__(self, folder: Path, changes: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        for name in FILES:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
            copy(ROOT / name, folder / name)
        shutil.copytree(ROOT / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache", "config.local"))
        self.put(changes)
        self.git("init", "--quiet")
        self.commit()

    @classmethod
    def copy_of(cls, original: Path, folder: Path) -> "Project":
        """Copy a project with all that it has computed."""
        shutil.copytree(original, folder, symlinks=True)
        project = cls.__new__(cls)
        project.folder = folder
        return project

    def put(self, changes: Mapping[str, Any]) -> None:
        """Change settings, given as dotted keys."""
        yaml, path = YAML(), self.folder / "params.yaml"
        tree = yaml.load(path)
        for key, value in changes.items():
            *parents, name = key.split(".")
            node = tree
            for parent in parents:
                node = node[parent]
            node[name] = value
        yaml.dump(tree, path)

    def git(self, *arguments: str) -> None:
        who = ("-c", "user.name=tester", "-c", "user.email=tester@example.com")
        subprocess.run(["git", *who, *arguments], cwd=self.folder, check=True, capture_output=True)

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", "state")

    @property
    def environment(self) -> dict[str, str]:
        bin_folder = str(Path(sys.executable).parent)
        return os.environ | {"PATH": bin_folder + os.pathsep + os.environ["PATH"], "PYTHONPATH": str(self.folder)}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a command in a session of its own; stdout and stderr go to one pipe-less file."""
        self.log = self.folder.parent / f"{self.folder.name}.log"
        with self.log.open("w") as log:
            return subprocess.Popen(
                arguments,
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def run(self, *arguments: str, status: int = 0) -> str:
        """Run a command to its end and return what it printed; the exit status is checked."""
        process = self.start(*arguments)
        process.wait(timeout=600)
        printed = self.log.read_text()
        assert process.returncode == status, printed[-4000:]
        return printed

    def repro(self, *arguments: str) -> str:
        return self.run("dvc", "repro", *arguments)

    def changed(self) -> set[str]:
        """Return the stages that DVC would run for a change of their own, or of a file; not those it always runs."""
        return set(json.loads(self.run("dvc", "status", "--json").splitlines()[-1])) - {"initial_weights"}

    def read(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())


def stage_process(stage: str, parent: int) -> psutil.Process | None:
    """Return the process that runs a stage below ``parent``, or None."""
    for process in psutil.Process(parent).children(recursive=True):
        try:
            if f"\0stage\0{stage}\0" in "\0".join([*process.cmdline(), ""]):
                return process
        except psutil.Error:
            continue
    return None


def kill_when(dvc: "subprocess.Popen[str]", stage: str, ready: Callable[[], bool], how: str) -> psutil.Process:
    """Wait until ``ready`` while ``stage`` runs, then SIGKILL its process, the whole group, or DVC alone."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and dvc.poll() is None:
        process = stage_process(stage, dvc.pid) if ready() else None
        if process is not None:
            if how == "process":
                process.kill()
            elif how == "group":
                os.killpg(dvc.pid, signal.SIGKILL)
            else:
                dvc.kill()
            dvc.wait(timeout=60)
            return process
        time.sleep(0.01)
    raise AssertionError(f"{stage} never came so far: dvc ended with {dvc.poll()}")
