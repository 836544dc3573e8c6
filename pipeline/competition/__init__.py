"""The competition's rules: image ids, run-length encoding, Dice. NumPy only."""
