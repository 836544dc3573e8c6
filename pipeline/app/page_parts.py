"""Shared parts of the app's pages: error display, colors, cached project files, an image slider."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from pipeline import workspace
from pipeline.config import PARAMS_FILE, read_params
from pipeline.data.competition_data import ImageSet, LabeledImages, data_dir
from pipeline.errors import CarvanaError
from pipeline.report.tables import read_table
from pipeline.workspace import REPORTS_DIR, project_root

_FOLDERS = re.compile(r"(?<![\w./\\~])(?:[A-Za-z]:)?[/\\](?:[^\s/\\'\"(),;:]+[/\\])+")
"""The folders of an absolute path, but not those of a relative path or a URL."""

_QUOTED = re.compile(r"(?<!\w)'([^'`]+)'(?!\w)")
_MARKUP = re.compile(r"([\\`*_{}\[\]<>$~#|:])")


@contextmanager
def show_errors() -> Iterator[None]:
    """Show errors that the user can fix. All others are left to Streamlit, which logs them without showing details."""
    try:
        yield
    except CarvanaError as error:
        st.error(error_markdown(error), icon=":material/error:")


def error_markdown(error: CarvanaError) -> str:
    """Return an error as Markdown, with paths relative to the project and commands as code."""
    return escape_markdown(hide_folders(str(error)))


def hide_folders(text: str) -> str:
    """Return text with paths relative to the project, so that it does not reveal where the project is."""
    for folder in sorted(_folders(), key=lambda folder: -len(str(folder))):
        text = text.replace(f"{folder}/", "")
    return _FOLDERS.sub("", text)


def _folders() -> Iterator[Path]:
    """Yield folders that messages may contain; their names may contain spaces, which ``_FOLDERS`` does not match."""
    yield from (Path.cwd().resolve(), project_root(), Path.home())
    with suppress(CarvanaError):
        yield data_dir(read_params().data, project_root()).parent


def escape_markdown(text: str) -> str:
    """Return Markdown that shows the text literally, except that parts in single quotes become code."""
    parts = _QUOTED.split(text)
    return "".join(f"`{part}`" if index % 2 else _MARKUP.sub(r"\\\1", part) for index, part in enumerate(parts))


_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b5508c", "#b08a00", "#3d9bd1", "#5b5ea6", "#555555")
_DARK = ("#56b4e9", "#e69f00", "#2fc295", "#e29bc4", "#f0e442", "#ff8a50", "#9db7ff", "#c9c9c9")
"""Based on the Okabe-Ito palette, which is safe for color-blind readers."""


def chart_config() -> dict[str, Any]:
    """Return a Vega-Lite ``config`` with the theme's colors and the mark styles of ``report/charts.py``."""
    dark = st.context.theme.type == "dark"
    paper, ink, soft = ("#14181e", "#e4e8ee", "#9aa6b4") if dark else ("#ffffff", "#1c2430", "#5b6675")
    label = {"fontSize": 12, "fontWeight": 600}
    return {
        "background": "transparent",
        "axis": {"titlePadding": 8},
        "legend": {"orient": "bottom", "direction": "horizontal", "symbolOpacity": 1},
        "range": {"category": list(_DARK if dark else _LIGHT)},
        "style": {
            "front": {"stroke": soft, "color": soft, "strokeWidth": 1.5},
            "current": {"stroke": ink, "color": ink},
            "label": {"color": ink, **label},
            "halo": {"color": paper, "stroke": paper, "strokeWidth": 3, **label},
        },
    }


FileFingerprint = tuple[tuple[str, int, int], ...]
"""Path, modification time and size of files; changes when their content does."""


def file_fingerprint(paths: Iterable[Path]) -> FileFingerprint:
    """Return the fingerprint of those files that exist."""
    states = []
    for path in paths:
        with suppress(OSError):
            state = path.stat()
            states.append((str(path), state.st_mtime_ns, state.st_size))
    return tuple(states)


def read_report_table(name: str) -> pd.DataFrame:
    """Return a CSV of ``reports/``; raises CarvanaError if it cannot be read."""
    return _table(name, file_fingerprint([REPORTS_DIR / name]))


def read_report_json(name: str) -> Mapping[str, Any]:
    """Return a JSON file of ``reports/``; raises CarvanaError if it cannot be read."""
    return workspace.read_json(REPORTS_DIR / name)


def training_images() -> LabeledImages:
    """Return the training images and masks; raises CarvanaError if they are not available."""
    return _training(file_fingerprint([Path(PARAMS_FILE), workspace.MANIFEST_FILE]))


def test_images() -> ImageSet:
    """Return the test images; raises CarvanaError if they are not available."""
    return _test(file_fingerprint([Path(PARAMS_FILE), workspace.MANIFEST_FILE]))


def test_ids() -> list[str]:
    """Return the ids of the test images, sorted; raises CarvanaError if they are not available."""
    return _test_ids(file_fingerprint([Path(PARAMS_FILE), workspace.MANIFEST_FILE]))


@st.cache_data(max_entries=8, show_spinner=False)
def _table(name: str, fingerprint: FileFingerprint) -> pd.DataFrame:
    return read_table(REPORTS_DIR / name)


@st.cache_resource(max_entries=1, show_spinner=False)
def _training(fingerprint: FileFingerprint) -> LabeledImages:
    return workspace.training_images(read_params())


@st.cache_resource(max_entries=1, show_spinner=False)
def _test(fingerprint: FileFingerprint) -> ImageSet:
    return workspace.test_images(read_params())


@st.cache_resource(max_entries=1, show_spinner=False)
def _test_ids(fingerprint: FileFingerprint) -> list[str]:
    return _test(fingerprint).ids()


_HTML, _CSS, _JS = (
    Path(__file__).with_name(f"slider{ending}").read_text(encoding="utf-8") for ending in (".html", ".css", ".js")
)

_component = st.components.v2.component("carvana_slider", html=_HTML, css=_CSS, js=_JS)


@dataclass(frozen=True)
class SliderImages:
    """Two images of one size, as data URIs, with alternative texts."""

    image: str
    layer: str
    image_text: str
    layer_text: str
    width: int
    height: int


def show_slider(images: SliderImages, key: str) -> None:
    """Show the image to the left of a slider and the layer to the right of it."""
    _component(data=asdict(images), key=key)
