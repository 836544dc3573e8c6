"""Data in: the zips, a drawn stand-in for them, and the folds."""
