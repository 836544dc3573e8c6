"""Tests. Folders mirror those of ``pipeline``."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
