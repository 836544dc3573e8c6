"""The rules of the game, in Python and NumPy only: ids, shapes, run-length codes, the metric and the CSV."""
