"""What Streamlit runs: the three pages, and the way between them. Rooms are entered with the page that needs them."""

from pathlib import Path

import streamlit as st


def _try() -> None:
    from pipeline.app import try_page

    try_page.show()


def _compare() -> None:
    from pipeline.app import ablation_page

    ablation_page.show()


def _submissions() -> None:
    from pipeline.app import submissions_page

    submissions_page.show()


# Streamlit fetches icons of its own from another host.
_ICON = Path(__file__).with_name("icon.svg").read_text(encoding="utf-8")

# Streamlit leaves a third of a telephone's screen empty above the title.
_STYLE = "<style>.stMainBlockContainer { padding-top: 1.5rem; } .stAppHeader { display: none; }</style>"

st.set_page_config(page_title="Carvana", page_icon=_ICON, layout="wide")
st.html(_STYLE)
_pages = [
    st.Page(_try, title="Try", icon=":material/image:", url_path="try", default=True),
    st.Page(_compare, title="Compare", icon=":material/query_stats:", url_path="compare"),
    st.Page(_submissions, title="Submissions", icon=":material/upload_file:", url_path="submissions"),
]
_page = st.navigation(_pages, position="hidden")
# Streamlit's own way between pages hides behind a button on telephones.
with st.container(horizontal=True):
    for _other in _pages:
        st.page_link(_other, width="content")
_page.run()
