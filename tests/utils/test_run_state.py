import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import CarvanaError
from pipeline.utils import run_state
from pipeline.utils.run_state import STATE_DIR, acquire_run_state, delete_states, state_sizes

TASK = "train/unet/0"
KEY = {"lr": 0.1, "images": ["a", "b"]}
SPAWN = multiprocessing.get_context("spawn")


def build(root: Path, cache_key: dict[str, Any] = KEY, text: str = "result") -> Path:
    """Hold a state and finish it, unless it is finished; return its folder."""
    with acquire_run_state(root, TASK, cache_key) as state:
        if not state.finished:
            built = state.work_dir / "built"
            built.mkdir()
            (built / "net").write_text(text)
            state.finish(built)
    return state.folder


def states(root: Path) -> set[Path]:
    return {path.parent for path in (root / STATE_DIR).rglob("key.json")}


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# ---------------------------------------------------------------- one process


def test_finished_work_is_kept_and_published(tmp_path: Path) -> None:
    build(tmp_path)
    with acquire_run_state(tmp_path, TASK, KEY) as state:
        assert state.finished
        assert not state.work_dir.exists()
        for _ in range(2):
            state.publish(tmp_path / "out")
    assert (tmp_path / "out" / "net").read_text() == "result"


def test_work_that_stopped_is_found_again(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), acquire_run_state(tmp_path, TASK, KEY) as state:
        (state.work_dir / "epoch").write_text("3")
        raise RuntimeError
    with acquire_run_state(tmp_path, TASK, KEY) as state:
        assert not state.finished
        assert (state.work_dir / "epoch").read_text() == "3"


def test_a_kill_in_the_midst_of_finish_leaves_a_finished_state(tmp_path: Path) -> None:
    folder = build(tmp_path)
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "checkpoint").write_text("left behind")
    with acquire_run_state(tmp_path, TASK, KEY) as state:
        assert state.finished
        assert not state.work_dir.exists()


@pytest.mark.parametrize("other", [{"lr": 0.2}, {"images": ["a"]}, {"images": ["b", "a"]}, {"more": None}])
def test_another_cache_key_gets_another_state(tmp_path: Path, other: dict[str, Any]) -> None:
    build(tmp_path)
    with acquire_run_state(tmp_path, TASK, KEY | other) as state:
        assert not state.finished
    with acquire_run_state(tmp_path, "train/unet/1", KEY) as state:
        assert not state.finished


def test_order_of_the_cache_key_does_not_matter(tmp_path: Path) -> None:
    build(tmp_path)
    with acquire_run_state(tmp_path, TASK, dict(reversed(KEY.items()))) as state:
        assert state.finished


def test_three_finished_states_are_kept_and_all_unfinished_ones(tmp_path: Path) -> None:
    with acquire_run_state(tmp_path, TASK, {"n": -1}) as unfinished:
        (unfinished.work_dir / "epoch").write_text("3")
    with acquire_run_state(tmp_path, "train/unet/1", {"n": 0}) as state:
        elsewhere = state.folder
    built = []
    for number in range(5):
        built.append(build(tmp_path, {"n": number}))
        if number == 3:
            build(tmp_path, {"n": 1})  # used again, so that it is no longer among the oldest
    assert states(tmp_path) == {built[1], built[3], built[4], unfinished.folder, elsewhere}
    assert (unfinished.work_dir / "epoch").read_text() == "3"


@pytest.mark.parametrize("how", ["clean", "too many"])
def test_a_kill_while_a_result_is_dropped_never_leaves_a_part_that_looks_whole(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, real = build(tmp_path, {"n": 0}), shutil.rmtree
    with monkeypatch.context() as killed:

        def remove_a_part(folder: Path, **how: Any) -> None:
            if not folder.name.endswith(".part"):
                return real(folder, **how)
            (folder / "result" / "net").unlink()
            raise KeyboardInterrupt

        killed.setattr(run_state.shutil, "rmtree", remove_a_part)
        with pytest.raises(KeyboardInterrupt):
            if how == "clean":
                delete_states(tmp_path)
            for number in range(1, 4):
                build(tmp_path, {"n": number})
    assert not first.exists()
    with acquire_run_state(tmp_path, TASK, {"n": 0}) as state:
        assert not state.finished
    build(tmp_path, {"n": 0})
    assert not list(tmp_path.rglob(".*.part")), "what the kill left is swept up"


# ---------------------------------------------------------------- several processes


def _build_slowly(root: Path, name: str) -> None:
    with acquire_run_state(root, TASK, KEY) as state:
        if not state.finished:
            with (root / "builders").open("a") as log:
                log.write(f"{name}\n")
            built = state.work_dir / "built"
            built.mkdir()
            wait_for(lambda: (root / "go on").exists())
            (built / "net").write_text(name)
            state.finish(built)
        state.publish(root / f"out-{name}")


def _hold_for_ever(root: Path) -> None:
    with acquire_run_state(root, TASK, KEY) as state:
        (state.work_dir / "epoch").write_text("3")
        (root / "held").touch()
        time.sleep(600)


def start(function: Callable[..., None], *arguments: object) -> SpawnProcess:
    process = SPAWN.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def test_a_second_process_waits_for_the_firsts_result(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = start(_build_slowly, tmp_path, "first")
    wait_for((tmp_path / "builders").exists)
    second = start(_build_slowly, tmp_path, "second")
    said = [""]

    def waits() -> bool:
        said[0] += capfd.readouterr().err
        return TASK in said[0]

    wait_for(waits)
    (tmp_path / "go on").touch()
    for process in (first, second):
        process.join(30)
        assert process.exitcode == 0
    assert (tmp_path / "builders").read_text() == "first\n"
    assert [(tmp_path / f"out-{name}" / "net").read_text() for name in ("first", "second")] == ["first"] * 2


def test_a_killed_holder_frees_the_state_and_leaves_its_work(tmp_path: Path) -> None:
    holder = start(_hold_for_ever, tmp_path)
    wait_for((tmp_path / "held").exists)
    with pytest.raises(CarvanaError, match=rf"\.resume/{TASK}/"):
        delete_states(tmp_path)
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(30)
    with acquire_run_state(tmp_path, TASK, KEY) as state:
        assert not state.finished
        assert (state.work_dir / "epoch").read_text() == "3"


# ---------------------------------------------------------------- clean


def test_clean_removes_every_state_and_sizes_lists_them(tmp_path: Path) -> None:
    folder = build(tmp_path, text="x" * 1000)
    with acquire_run_state(tmp_path, "predict/test/unet/0", KEY):
        pass
    listed = state_sizes(tmp_path)
    assert len(listed) == 2
    assert 1000 < listed[str(folder.relative_to(tmp_path))] < 2000
    delete_states(tmp_path)
    assert state_sizes(tmp_path) == {}
    assert not folder.exists()
    delete_states(tmp_path)
