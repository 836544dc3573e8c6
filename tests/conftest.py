"""Fixtures that several test files share."""

from pathlib import Path

import pytest

from pipeline.data.sample import draw_sample
from pipeline.data.settings import SampleSettings


@pytest.fixture(scope="session")
def real_carvana() -> Path:
    """The folder of real competition zips beside the checkout; a test that asks for it is skipped without them."""
    folder = Path(__file__).parents[2] / "shared" / "carvana"
    if not (folder / "train_masks.csv.zip").exists():
        pytest.skip(f"needs the competition's own files in {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny_sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of drawn competition files: 4 cars to train on, 1 to test. Not to be written to."""
    folder = tmp_path_factory.mktemp("tiny_sample")
    draw_sample(folder, SampleSettings(train_cars=4, test_cars=1), workers=2)
    return folder
