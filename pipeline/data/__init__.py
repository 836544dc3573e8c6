"""The competition's files: archives, decoding, ingest, folds."""
