"""The competition's files: archives, decoding, ingest and checks, folds."""
