"""Charts, overlays, tables, and the HTML report."""
