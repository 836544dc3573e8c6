"""The page of ``carvana app``: try nets, compare settings, see submissions."""
