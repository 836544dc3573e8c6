"""Carvana image masking, from the competition's zips to a submission CSV."""

import os

# Torch's threads spin while they wait for each other. Where another program wants the cores too, that makes a net up
# to eight times slower; spinning for microseconds costs nothing where they are free. Read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
