"""Fixtures that several test files share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

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


@pytest.fixture(scope="session")
def tiny_sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of drawn competition files: 4 cars to train on, 1 to test. Not to be written to."""
    folder = tmp_path_factory.mktemp("tiny_sample")
    draw_sample(folder, SampleSettings(train_cars=4, test_cars=1), workers=2)
    return folder


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
            "PYTHONPATH": str(ROOT),
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
