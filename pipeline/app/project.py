"""What the pages read of the project, read again when it changes: files of runs, the competition's pictures."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from pipeline.data.source import ImageSet, LabeledImages
from pipeline.params import PARAMS_FILE, read_params
from pipeline.reporting.tables import read_table
from pipeline.stages import inputs

REPORTS_DIR = Path("reports")

FileFingerprint = tuple[tuple[str, int, int], ...]
"""Path, time of change and size of files: another stamp, other content."""


def file_fingerprint(paths: Iterable[Path]) -> FileFingerprint:
    """Return the stamp of those of some files that are there."""
    states = []
    for path in paths:
        with suppress(OSError):
            state = path.stat()
            states.append((str(path), state.st_mtime_ns, state.st_size))
    return tuple(states)


def read_report_table(name: str) -> pd.DataFrame:
    """Return a CSV of ``reports/``; raises CarvanaError if it can't be read."""
    return _table(name, file_fingerprint([REPORTS_DIR / name]))


def read_report_json(name: str) -> Mapping[str, Any]:
    """Return a JSON file of ``reports/``; raises CarvanaError if it can't be read."""
    return inputs.read_json(REPORTS_DIR / name)


def training_images() -> LabeledImages:
    """Return the training images and masks; raises CarvanaError if they are not available."""
    return _training(file_fingerprint([Path(PARAMS_FILE), inputs.MANIFEST_FILE]))


def test_images() -> ImageSet:
    """Return the test images; raises CarvanaError if they are not available."""
    return _test(file_fingerprint([Path(PARAMS_FILE), inputs.MANIFEST_FILE]))


def test_ids() -> list[str]:
    """Return the ids of the test images, sorted; raises CarvanaError if they are not available."""
    return _test_ids(file_fingerprint([Path(PARAMS_FILE), inputs.MANIFEST_FILE]))


@st.cache_data(max_entries=8, show_spinner=False)
def _table(name: str, stamp: FileFingerprint) -> pd.DataFrame:
    return read_table(REPORTS_DIR / name)


@st.cache_resource(max_entries=1, show_spinner=False)
def _training(stamp: FileFingerprint) -> LabeledImages:
    return inputs.training_images(read_params())


@st.cache_resource(max_entries=1, show_spinner=False)
def _test(stamp: FileFingerprint) -> ImageSet:
    return inputs.test_images(read_params())


@st.cache_resource(max_entries=1, show_spinner=False)
def _test_ids(stamp: FileFingerprint) -> list[str]:
    return _test(stamp).ids()
