"""Nets that leave the house: files that run elsewhere, each checked against the net before it gets its name."""
