"""The stages by name, in the order of the pipeline, and what each needs."""

STAGES = ("scan", "shard", "vae", "encode", "reference", "train", "ema", "sample", "evaluate", "register", "report")
ACCELERATED = frozenset({"vae", "encode", "reference", "train", "sample", "evaluate"})
SHARED = frozenset({"reference", "sample", "evaluate"})  # what several processes, started by torchrun, do as one
