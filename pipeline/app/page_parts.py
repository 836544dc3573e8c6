"""What the app's pages share: errors, colors, cached files of the project, an image slider."""

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
"""The folders of an absolute path; before the first slash stands something in a relative one, a slash in an address."""

_QUOTED = re.compile(r"(?<!\w)'([^'`]+)'(?!\w)")
_MARKUP = re.compile(r"([\\`*_{}\[\]<>$~#|:])")


@contextmanager
def show_errors() -> Iterator[None]:
    """Show an error that a user can fix; any other is Streamlit's, which shows none of it but logs it."""
    try:
        yield
    except CarvanaError as error:
        st.error(error_markdown(error), icon=":material/error:")


def error_markdown(error: CarvanaError) -> str:
    """Return an error as Markdown: paths as the project knows them, commands set as code, nothing else marked up."""
    return escape_markdown(hide_folders(str(error)))


def hide_folders(words: str) -> str:
    """Return words with paths as the project knows them, and nothing else of where it lies."""
    for folder in sorted(_folders(), key=lambda folder: -len(str(folder))):
        words = words.replace(f"{folder}/", "")
    return _FOLDERS.sub("", words)


def _folders() -> Iterator[Path]:
    """Yield folders that messages may name, which may have spaces in their names."""
    yield from (Path.cwd().resolve(), project_root(), Path.home())
    with suppress(CarvanaError):
        yield data_dir(read_params().data, project_root()).parent


def escape_markdown(words: str) -> str:
    """Return Markdown that shows just these words; what stands in single quotes, such as commands, as code."""
    parts = _QUOTED.split(words)
    return "".join(f"`{part}`" if index % 2 else _MARKUP.sub(r"\\\1", part) for index, part in enumerate(parts))


_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b5508c", "#b08a00", "#3d9bd1", "#5b5ea6", "#555555")
_DARK = ("#56b4e9", "#e69f00", "#2fc295", "#e29bc4", "#f0e442", "#ff8a50", "#9db7ff", "#c9c9c9")
"""After Okabe and Ito, told apart by the color-blind."""


def chart_config() -> dict[str, Any]:
    """Return Vega-Lite's ``config`` of colors, and of the styles that ``report/charts.py`` names."""
    night = st.context.theme.type == "dark"
    paper, ink, soft = ("#14181e", "#e4e8ee", "#9aa6b4") if night else ("#ffffff", "#1c2430", "#5b6675")
    label = {"fontSize": 12, "fontWeight": 600}
    return {
        "background": "transparent",
        "axis": {"titlePadding": 8},
        "legend": {"orient": "bottom", "direction": "horizontal", "symbolOpacity": 1},
        "range": {"category": list(_DARK if night else _LIGHT)},
        "style": {
            "front": {"stroke": soft, "color": soft, "strokeWidth": 1.5},
            "current": {"stroke": ink, "color": ink},
            "label": {"color": ink, **label},
            "halo": {"color": paper, "stroke": paper, "strokeWidth": 3, **label},
        },
    }


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
def _table(name: str, stamp: FileFingerprint) -> pd.DataFrame:
    return read_table(REPORTS_DIR / name)


@st.cache_resource(max_entries=1, show_spinner=False)
def _training(stamp: FileFingerprint) -> LabeledImages:
    return workspace.training_images(read_params())


@st.cache_resource(max_entries=1, show_spinner=False)
def _test(stamp: FileFingerprint) -> ImageSet:
    return workspace.test_images(read_params())


@st.cache_resource(max_entries=1, show_spinner=False)
def _test_ids(stamp: FileFingerprint) -> list[str]:
    return _test(stamp).ids()


_HTML, _CSS, _JS = (
    Path(__file__).with_name(f"slider{ending}").read_text(encoding="utf-8") for ending in (".html", ".css", ".js")
)

_component = st.components.v2.component("carvana_slider", html=_HTML, css=_CSS, js=_JS)


@dataclass(frozen=True)
class SliderImages:
    """Two pictures of one size, as data URIs, with words for those who can't see them."""

    photo: str
    layer: str
    photo_words: str
    layer_words: str
    width: int
    height: int


def compare(comparison: SliderImages, key: str) -> None:
    """Show the photograph left of a slider and the layer right of it."""
    _component(data=asdict(comparison), key=key)
