"""Read, check and score submission CSVs. NumPy only."""
