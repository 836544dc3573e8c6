"""Run state: work that resumes after a kill, keyed by everything that determines its result."""

import contextlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.errors import CarvanaError
from pipeline.utils.files import publish_tree, remove_path, sha256_of, write_json

STATE_DIR = ".resume"
"""Folder of all run states, in the project's root and outside DVC."""

_FINISHED_STATES_KEPT = 3

_DROPPED = f".{'?' * 16}.{'?' * 8}.part"
"""Name of a state that is being deleted."""


@dataclass(frozen=True)
class RunState:
    """One piece of work that can be resumed."""

    folder: Path

    @property
    def work_dir(self) -> Path:
        """Folder for checkpoints and finished shards; deleted when the work is finished."""
        return self.folder / "unfinished"

    @property
    def result_dir(self) -> Path:
        """Folder of the finished result."""
        return self.folder / "result"

    @property
    def finished(self) -> bool:
        """Whether the result is complete."""
        return self.result_dir.is_dir()

    def finish(self, built: Path) -> None:
        """Make the folder ``built`` (in ``work_dir``) the result, atomically, and delete ``work_dir``."""
        built.rename(self.result_dir)
        remove_path(self.work_dir)

    def publish(self, target: Path) -> None:
        """Copy the result to ``target``; may be repeated."""
        publish_tree(self.result_dir, target)


def package_versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of packages."""
    return {package: version(package) for package in packages}


@contextlib.contextmanager
def acquire_run_state(root: Path, task: str, cache_key: Mapping[str, Any]) -> Iterator[RunState]:
    """Lock and yield the state of a ``task`` (such as ``train/unet/0``) with this ``cache_key``.

    The key is JSON of everything that determines the result, so that the state of other settings is never used. If
    another process holds the lock (a killed ``dvc`` leaves its stage running), wait for it and take over its result.
    The system releases the lock when its process ends.
    """
    text = json.dumps(cache_key, sort_keys=True)
    folder = root / STATE_DIR / task / sha256_of(text.encode())[:16]
    # The lock is beside the folder, so that deleting the folder never deletes a lock that somebody waits for.
    with file_lock(folder.with_suffix(".lock"), task):
        folder.mkdir(exist_ok=True)
        write_json(folder / "facts.json", dict(cache_key))
        state = RunState(folder)
        if state.finished:
            remove_path(state.work_dir)  # left by a kill during finish
        else:
            state.work_dir.mkdir(exist_ok=True)
            for stale in [*state.work_dir.rglob(".*.part")]:
                remove_path(stale)
        yield state
        if state.finished:
            os.utime(folder)
            _prune(folder)


@contextlib.contextmanager
def file_lock(lock: Path, label: str) -> Iterator[None]:
    """Hold the file ``lock``, waiting for a process that holds it; ``label`` names its work in a message."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        print(f"Another run is working on {label}. Waiting for it.", file=sys.stderr)
        held.acquire()
    try:
        yield
    finally:
        held.release()


def state_sizes(root: Path) -> dict[str, int]:
    """Return the size of each state in bytes, including files that DVC's cache links to."""
    return {
        str(state.relative_to(root)): sum(path.stat().st_size for path in state.rglob("*") if path.is_file())
        for state in _states(root)
    }


def delete_states(root: Path) -> None:
    """Delete all states; raises CarvanaError if a run holds one."""
    for state in _states(root):
        try:
            with FileLock(state.with_suffix(".lock"), timeout=0):
                _delete(state)
        except Timeout as error:
            raise CarvanaError(f"A run is working on {state.relative_to(root)}. Stop it first.") from error
    for stale in [*(root / STATE_DIR).rglob(_DROPPED)]:
        shutil.rmtree(stale, ignore_errors=True)


def _states(root: Path) -> list[Path]:
    return [facts.parent for facts in sorted((root / STATE_DIR).rglob("facts.json")) if facts.parent.name[0] != "."]


def _prune(current: Path) -> None:
    """Delete all but the newest finished states of a task; unfinished work stays."""
    others = [path for path in current.parent.iterdir() if path != current and path.name[0] != "."]
    finished = [path for path in others if RunState(path).finished]
    finished.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in finished[_FINISHED_STATES_KEPT - 1 :]:
        with contextlib.suppress(Timeout), FileLock(path.with_suffix(".lock"), timeout=0):
            _delete(path)
    for stale in current.parent.glob(_DROPPED):
        shutil.rmtree(stale, ignore_errors=True)  # another process may be at it


def _delete(state: Path) -> None:
    """Delete a state; renamed first, so that no kill leaves half a result."""
    aside = state.with_name(f".{state.name}.{uuid.uuid4().hex[:8]}.part")
    state.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
