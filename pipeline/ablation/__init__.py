"""Score many ensemble settings and compare them."""
