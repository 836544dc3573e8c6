"""The script that Streamlit runs: three pages and the navigation. Each page is imported when it is opened."""

from pathlib import Path

import streamlit as st


def _try() -> None:
    from pipeline.app import try_page

    try_page.show()


def _ablation() -> None:
    from pipeline.app import ablation_page

    ablation_page.show()


def _submissions() -> None:
    from pipeline.app import submissions_page

    submissions_page.show()


# Streamlit would fetch its own icons from another host.
_ICON = Path(__file__).with_name("icon.svg").read_text(encoding="utf-8")

# By default Streamlit leaves a third of a phone's screen empty above the title.
_STYLE = "<style>.stMainBlockContainer { padding-top: 1.5rem; } .stAppHeader { display: none; }</style>"

st.set_page_config(page_title="Carvana", page_icon=_ICON, layout="wide")
st.html(_STYLE)
_pages = [
    st.Page(_try, title="Try", icon=":material/image:", url_path="try", default=True),
    st.Page(_ablation, title="Ablation", icon=":material/query_stats:", url_path="ablation"),
    st.Page(_submissions, title="Submissions", icon=":material/upload_file:", url_path="submissions"),
]
_page = st.navigation(_pages, position="hidden")
# On phones, Streamlit's own navigation is hidden behind a button.
with st.container(horizontal=True):
    for _other in _pages:
        st.page_link(_other, width="content")
_page.run()
