"""Cached state of long-running work, such as training, so that an interrupted run can resume.

A state is keyed by everything that decides the result, and locked by one process at a time.
"""

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
"""Folder of all states, in the project root and not tracked by DVC."""

_KEY_FILE = "key.json"
"""File in each state that holds its cache key, for people who want to know what the state belongs to."""

_MAX_FINISHED = 3
"""Number of finished states kept per task."""

_DELETED = f".{'?' * 16}.{'?' * 8}.part"
"""Glob of states that are being deleted, see ``_delete``."""


@dataclass(frozen=True)
class RunState:
    """State of one piece of work: checkpoints while it is unfinished, then its result."""

    folder: Path

    @property
    def work_dir(self) -> Path:
        """Folder for checkpoints and finished shards; removed when the work is finished."""
        return self.folder / "unfinished"

    @property
    def result_dir(self) -> Path:
        """Folder of the result; exists only when the work is finished."""
        return self.folder / "result"

    @property
    def finished(self) -> bool:
        """Whether the result is complete."""
        return self.result_dir.is_dir()

    def finish(self, built: Path) -> None:
        """Make the folder ``built``, inside ``work_dir``, the result, and delete the rest of ``work_dir``."""
        built.rename(self.result_dir)
        remove_path(self.work_dir)

    def publish(self, target: Path) -> None:
        """Replace ``target`` by a copy of the result."""
        publish_tree(self.result_dir, target)


def package_versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each package, for use in a cache key."""
    return {package: version(package) for package in packages}


@contextlib.contextmanager
def acquire_run_state(root: Path, task: str, cache_key: Mapping[str, Any]) -> Iterator[RunState]:
    """Lock and yield the state of ``task``, such as ``train/unet/0``, for ``cache_key``.

    ``cache_key`` is JSON of everything that decides the result, so that a state made with other settings is never
    reused. If another process holds the state, such as a stage that a killed ``dvc`` left running, wait for it and
    then use its result. The operating system releases the lock however the process ends.
    """
    text = json.dumps(cache_key, sort_keys=True)
    folder = root / STATE_DIR / task / sha256_of(text.encode())[:16]
    # The lock is beside the folder, so that deleting the folder never deletes a lock that another process waits for.
    with file_lock(folder.with_suffix(".lock"), task):
        folder.mkdir(exist_ok=True)
        write_json(folder / _KEY_FILE, dict(cache_key))
        state = RunState(folder)
        if state.finished:
            remove_path(state.work_dir)  # left if the process was killed during finish()
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
    """Hold the lock file ``lock``. If another process holds it, print that it works on ``label``, and wait."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        print(f"Another run is working on {label}. Waiting for it to finish.", file=sys.stderr)
        held.acquire()
    try:
        yield
    finally:
        held.release()


def state_sizes(root: Path) -> dict[str, int]:
    """Return the size in bytes of each state, by its path relative to ``root``.

    Files that DVC's cache also links to are included.
    """
    return {
        str(state.relative_to(root)): sum(path.stat().st_size for path in state.rglob("*") if path.is_file())
        for state in _states(root)
    }


def delete_states(root: Path) -> None:
    """Delete every state; raises CarvanaError if a run is using one."""
    for state in _states(root):
        try:
            with FileLock(state.with_suffix(".lock"), timeout=0):
                _delete(state)
        except Timeout as error:
            raise CarvanaError(f"A run is working on {state.relative_to(root)}. Stop it first.") from error
    for stale in [*(root / STATE_DIR).rglob(_DELETED)]:
        shutil.rmtree(stale, ignore_errors=True)


def _states(root: Path) -> list[Path]:
    return [path.parent for path in sorted((root / STATE_DIR).rglob(_KEY_FILE)) if path.parent.name[0] != "."]


def _prune(current: Path) -> None:
    """Delete all but the newest finished states of the task of ``current``; unfinished ones are kept."""
    others = [path for path in current.parent.iterdir() if path != current and path.name[0] != "."]
    finished = [path for path in others if RunState(path).finished]
    finished.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in finished[_MAX_FINISHED - 1 :]:
        with contextlib.suppress(Timeout), FileLock(path.with_suffix(".lock"), timeout=0):
            _delete(path)
    for stale in current.parent.glob(_DELETED):
        shutil.rmtree(stale, ignore_errors=True)  # another process may be deleting it too


def _delete(state: Path) -> None:
    """Delete a state. It is renamed first, so that a kill never leaves a part of a result that looks complete."""
    renamed = state.with_name(f".{state.name}.{uuid.uuid4().hex[:8]}.part")
    state.rename(renamed)
    shutil.rmtree(renamed, ignore_errors=True)
