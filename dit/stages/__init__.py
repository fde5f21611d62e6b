"""One module per stage of dvc.yaml: files in, files out."""

import gc
import os
import signal
import sys

# torch, diffusers and MLflow make hundreds of thousands of objects while they are imported, and these live for ever. At
# Python's own threshold the collector walks them again and again: a quarter of a stage's start.
gc.set_threshold(100_000)


def _interrupted(number: int, _: object) -> None:
    os.write(2, f"interrupted by {signal.Signals(number).name} before it began: run the same command again\n".encode())
    os._exit(75)


if sys.argv[0] == "-m":  # `python -m dit.stages.X`: the imports take seconds, and entry.main is still to come
    for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(_number, _interrupted)
