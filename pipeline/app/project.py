"""What the pages read of the project, read again when it changes: files of runs, the competition's pictures."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from pipeline.data.source import Labelled, Photos
from pipeline.params import FILE, read_params
from pipeline.reporting.tables import read_table
from pipeline.stages import inputs

REPORTS = Path("reports")

Stamp = tuple[tuple[str, int, int], ...]
"""Path, time of change and size of files: another stamp, other content."""


def stamp(paths: Iterable[Path]) -> Stamp:
    """Return the stamp of those of some files that are there."""
    states = []
    for path in paths:
        with suppress(OSError):
            state = path.stat()
            states.append((str(path), state.st_mtime_ns, state.st_size))
    return tuple(states)


def table(name: str) -> pd.DataFrame:
    """Return a CSV of ``reports/``; raises PipelineError if it can't be read."""
    return _table(name, stamp([REPORTS / name]))


def facts(name: str) -> Mapping[str, Any]:
    """Return a JSON file of ``reports/``; raises PipelineError if it can't be read."""
    return inputs.read_json(REPORTS / name)


def training_images() -> Labelled:
    """Return the training images and masks; raises PipelineError if they are not at hand."""
    return _training(stamp([Path(FILE), inputs.MANIFEST]))


def test_images() -> Photos:
    """Return the test images; raises PipelineError if they are not at hand."""
    return _test(stamp([Path(FILE), inputs.MANIFEST]))


def test_ids() -> list[str]:
    """Return the ids of the test images, sorted; raises PipelineError if they are not at hand."""
    return _test_ids(stamp([Path(FILE), inputs.MANIFEST]))


@st.cache_data(max_entries=8, show_spinner=False)
def _table(name: str, stamp: Stamp) -> pd.DataFrame:
    return read_table(REPORTS / name)


@st.cache_resource(max_entries=1, show_spinner=False)
def _training(stamp: Stamp) -> Labelled:
    return inputs.training_images(read_params())


@st.cache_resource(max_entries=1, show_spinner=False)
def _test(stamp: Stamp) -> Photos:
    return inputs.test_images(read_params())


@st.cache_resource(max_entries=1, show_spinner=False)
def _test_ids(stamp: Stamp) -> list[str]:
    return _test(stamp).ids()
