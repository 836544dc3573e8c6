"""The one run of the whole pipeline that the end-to-end tests share."""

from pathlib import Path

import pytest

from tests.conftest import build_once
from tests.end_to_end.dvc_project import TINY, Project


@pytest.fixture(scope="session")
def finished_project(tmp_path_factory: pytest.TempPathFactory, tiny_sample: Path) -> Path:
    """The folder of a project after ``dvc repro`` on the tiny sample. Not to be written to: see Project.copy_of."""

    def build(folder: Path) -> None:
        project = Project(folder, TINY | {"data.directory": str(tiny_sample)})
        project.repro()
        project.commit()

    return build_once(tmp_path_factory, "finished_project", build)
