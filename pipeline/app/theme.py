"""Charts by day and by night, as the report has them."""

from typing import Any

import streamlit as st

_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b5508c", "#b08a00", "#3d9bd1", "#5b5ea6", "#555555")
_DARK = ("#56b4e9", "#e69f00", "#2fc295", "#e29bc4", "#f0e442", "#ff8a50", "#9db7ff", "#c9c9c9")
"""After Okabe and Ito, told apart by the color-blind."""


def chart_config() -> dict[str, Any]:
    """Return Vega-Lite's ``config`` of colors, and of the styles that ``reporting/charts.py`` names."""
    night = st.context.theme.type == "dark"
    paper, ink, soft = ("#14181e", "#e4e8ee", "#9aa6b4") if night else ("#ffffff", "#1c2430", "#5b6675")
    word = {"fontSize": 12, "fontWeight": 600}
    return {
        "background": "transparent",
        "axis": {"titlePadding": 8},
        "legend": {"orient": "bottom", "direction": "horizontal", "symbolOpacity": 1},
        "range": {"category": list(_DARK if night else _LIGHT)},
        "style": {
            "front": {"stroke": soft, "color": soft, "strokeWidth": 1.5},
            "now": {"stroke": ink, "color": ink},
            "word": {"color": ink, **word},
            "halo": {"color": paper, "stroke": paper, "strokeWidth": 3, **word},
        },
    }
