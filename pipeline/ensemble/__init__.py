"""Merge probability maps into masks, evaluate them, write the submission."""
