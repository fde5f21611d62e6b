"""The stages by name, in the order of the pipeline, and what each needs."""

STAGES = ("scan", "shard", "vae", "encode", "reference", "train", "ema", "sample", "evaluate", "register", "report")
ACCELERATED = frozenset({"vae", "encode", "reference", "train", "sample", "evaluate"})
SHARED = frozenset({"encode", "reference", "train", "sample", "evaluate"})  # what several processes do as one
