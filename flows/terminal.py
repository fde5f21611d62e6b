"""A flow started by hand, in this process: `python -m flows.train_dit ...`, `flows.retrain`, `flows.study`."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import Flow
from prefect.context import refresh_global_settings_context
from prefect.settings import get_current_settings

from flows import leash, servers, workplace
from flows.workplace import Wanted


def options(flow: Flow, module: str) -> argparse.ArgumentParser:
    """The options that all flows take; their names are those of the flow's parameters."""
    parser = argparse.ArgumentParser(prog=f"python -m flows.{module}", description=flow.description)
    parser.add_argument("--preset", help="settings: a file in presets/")
    parser.add_argument("--set", action="append", metavar="SETTING=VALUE", help="train.max_steps=1000")
    parser.add_argument("--source", help="other images: a folder, an archive, s3://bucket/prefix")
    parser.add_argument("--no-push", dest="push", action="store_false", help="keep the results on this machine")
    parser.add_argument("--pool", help="the work pool of whatever needs an accelerator")
    parser.add_argument("--anyway", action="store_true", help="start although the preflight advises against it")
    return parser


def run(flow: Flow, told: dict[str, Any], refuse: Callable[[], None] = lambda: None) -> int:
    """Run a flow with these parameters, on a server that is started if none runs; returns 0 if it completed.

    What can be seen to be wrong, `refuse` (which raises ValueError) included, is told before a server is started.
    """
    try:
        leash.save_seconds()
        workplace.refuse(Path.cwd(), Wanted(told["preset"], tuple(told["set"] or ()), told["source"]))
        refuse()
        os.environ.update(servers.for_this_process(Path.cwd(), get_current_settings().api.url))
    except ValueError as error:
        print("\n".join(f"{flow.name}: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 1
    refresh_global_settings_context()  # Prefect read the environment when it was imported
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_says_more)
    try:
        state = flow(**told, return_state=True)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print(f"{flow.name}: {state.name}: {state.message}")
    return 0 if state.is_completed() else 1


def _says_more(record: logging.LogRecord) -> bool:
    """Whether a line of the log says more than the last one of `run` will, which tells why the flow failed."""
    return not record.getMessage().startswith("Finished in state Failed(")
