"""A picture under another, with a slider between them: ``slider.html``, ``.css`` and ``.js``, which fetch nothing."""

from dataclasses import asdict, dataclass
from pathlib import Path

import streamlit as st

_HTML, _CSS, _JS = (
    Path(__file__).with_suffix(ending).read_text(encoding="utf-8") for ending in (".html", ".css", ".js")
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
