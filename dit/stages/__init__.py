"""One module per stage of dvc.yaml: files in, files out."""

import gc

# torch, diffusers and MLflow make hundreds of thousands of objects while they are imported, and these live for ever. At
# Python's own threshold the collector walks them again and again: a quarter of a stage's start.
gc.set_threshold(100_000)
