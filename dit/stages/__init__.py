"""One module per stage of dvc.yaml: files in, files out."""
