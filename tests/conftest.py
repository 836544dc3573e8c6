"""Fixtures that several test files share."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

# Tests run side by side: a second thread of a tiny net only waits. Set before torch is imported; processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Processes that tests start, in any folder, import this checkout.
os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])

import pytest
from filelock import FileLock

from pipeline.config import SampleSettings
from pipeline.synthetic.sample_competition import draw_sample
from tests import ROOT
from tests.fakes.fake_kaggle import TOKEN, KaggleServer


@pytest.fixture(scope="session")
def real_carvana() -> Path:
    """The folder of real competition zips beside the checkout; a test that asks for it is skipped without them."""
    folder = ROOT.parent / "shared" / "carvana"
    if not (folder / "train_masks.csv.zip").exists():
        pytest.skip(f"needs the competition's own files in {folder}")
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for torch, whatever the environment says: tiny nets wait longer for threads than they work."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


LONG_FILES = ("end_to_end/", "export/", "kaggle/", "training/", "benchmarks/", "report/", "segment/")
"""In this order: they run first, so that at the end no worker is left with a long one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the long files first; ``long`` implies ``slow``."""

    def rank(item: pytest.Item) -> int:
        path = item.path.relative_to(ROOT / "tests").as_posix()
        return next((n for n, prefix in enumerate(LONG_FILES) if path.startswith(prefix)), len(LONG_FILES))

    items.sort(key=rank)
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker("slow")


def build_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], None]) -> Path:
    """Return a folder that ``build`` fills once for all processes of this run. Not to be written to."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, complete = base / name, base / f"{name}.complete"
    with FileLock(base / f"{name}.lock"):
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            build(folder)
            complete.touch()
    return folder


@pytest.fixture(scope="session")
def tiny_sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of drawn competition files: 4 cars to train on, 1 to test. Not to be written to."""

    def build(folder: Path) -> None:
        folder.mkdir()
        draw_sample(folder, SampleSettings(train_cars=4, test_cars=1), workers=2)

    return build_once(tmp_path_factory, "tiny_sample", build)


@pytest.fixture
def environment(server: KaggleServer, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Variables that lead the real client to a test's own ``server``: no credentials and no proxy but ours."""
    with server.running() as address:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.upper().startswith("KAGGLE") and not name.upper().endswith("_PROXY")
        }
        (tmp_path / "home").mkdir()
        yield kept | {
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            "KAGGLE_API_TOKEN": TOKEN,
            "HTTP_PROXY": address,
            "http_proxy": address,
            "HOME": str(tmp_path / "home"),
            "XDG_CONFIG_HOME": str(tmp_path / "home" / ".config"),
        }


@pytest.fixture
def kaggle(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lead the real client in this process to a test's own ``server``."""
    for name in os.environ.keys() - environment.keys():
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def net_folder(tmp_path: Path) -> Path:
    """The folder of an untrained net of 32 x 48 pixels, for this test alone."""
    from tests.fakes.tiny_nets import save_tiny_net

    return save_tiny_net(tmp_path)
