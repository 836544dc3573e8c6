"""One thin file a stage of dvc.yaml: settings in, one call, files out."""
