"""Segment the user's own images."""
