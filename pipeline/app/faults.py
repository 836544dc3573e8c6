"""Errors on the page: in the words of the commands, without a path of the server."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import streamlit as st

from pipeline.data.settings import data_dir
from pipeline.errors import CarvanaError
from pipeline.params import read_params
from pipeline.places import project_root

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
