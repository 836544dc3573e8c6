"""One file a command of ``carvana`` that is no stage: what it says and does, over the rooms."""
