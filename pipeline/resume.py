"""State that survives a kill: keyed by everything that decides the result, held by one process at a time."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipeline.errors import PipelineError
from pipeline.files import publish, remove, sha256_of, write_json

FOLDER = ".resume"
"""Folder of all states, in the project's own root and outside DVC."""

_FINISHED_STATES_KEPT = 3


@dataclass(frozen=True)
class State:
    """One piece of work that can be taken up where it stopped."""

    folder: Path

    @property
    def work(self) -> Path:
        """Folder for checkpoints and finished shards; gone once the work is finished."""
        return self.folder / "unfinished"

    @property
    def result(self) -> Path:
        """Folder of the finished result."""
        return self.folder / "result"

    @property
    def finished(self) -> bool:
        """Whether the result is there, whole."""
        return self.result.is_dir()

    def finish(self, built: Path) -> None:
        """Make the folder ``built`` (below ``work``) the result, at one stroke, and drop the rest of the work."""
        built.rename(self.result)
        remove(self.work)

    def publish(self, target: Path) -> None:
        """Put the result at ``target``; doing it twice does no harm."""
        publish(self.result, target)


def versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of packages, as facts."""
    return {package: version(package) for package in packages}


@contextlib.contextmanager
def hold(root: Path, slot: str, facts: Mapping[str, Any]) -> Iterator[State]:
    """Hold the state of ``slot`` (such as ``train/unet/0``) that belongs to ``facts``, alone.

    ``facts`` is JSON of everything that decides the result, so that state of other settings is never picked up.
    Where another process holds it (a killed ``dvc`` leaves its stage running), wait for that one: its result is
    then taken over. The lock goes with its process, however that ends.
    """
    text = json.dumps(facts, sort_keys=True)
    folder = root / FOLDER / slot / sha256_of(text.encode())[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, slot):
        write_json(folder / "facts.json", dict(facts))
        state = State(folder)
        if state.finished:
            remove(state.work)  # what a kill in the midst of finish left
        else:
            state.work.mkdir(exist_ok=True)
            for left_by_a_kill in [*state.work.rglob(".*.part")]:
                remove(left_by_a_kill)
        yield state
        if state.finished:
            os.utime(folder)
            _forget_old_results(folder)


def sizes(root: Path) -> dict[str, int]:
    """Return the bytes that each slot keeps, results that DVC's cache links to included."""
    states = [path.parent for path in sorted((root / FOLDER).rglob("facts.json"))]
    return {
        str(state.relative_to(root)): sum(path.stat().st_size for path in state.rglob("*") if path.is_file())
        for state in states
    }


def clean(root: Path) -> None:
    """Remove every state; raises PipelineError if a run holds one."""
    for facts in sorted((root / FOLDER).rglob("facts.json")):
        try:
            with FileLock(facts.parent.with_suffix(".lock"), timeout=0):
                remove(facts.parent)
        except Timeout as error:
            raise PipelineError(f"A run is working on {facts.parent.relative_to(root)}: stop it first.") from error


@contextlib.contextmanager
def _locked(folder: Path, slot: str) -> Iterator[None]:
    # The lock lies beside the folder, so that removing the folder never removes a lock that somebody waits for.
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Another run is working on {slot}: waiting for it, to take over its result.", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _forget_old_results(current: Path) -> None:
    """Drop all but the newest finished states of a slot; unfinished work stays."""
    finished = [path for path in current.parent.iterdir() if path != current and State(path).finished]
    finished.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in finished[_FINISHED_STATES_KEPT - 1 :]:
        with contextlib.suppress(Timeout), FileLock(path.with_suffix(".lock"), timeout=0):
            remove(path)
