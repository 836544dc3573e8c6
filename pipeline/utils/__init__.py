"""Helpers without knowledge of the competition: files, run state, parallel work, array types."""
