"""Maps of probability, stored and merged into masks. NumPy only."""
