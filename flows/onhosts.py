#!/usr/bin/env python
"""A shell for DVC that runs the command of a stage on other hosts, and every other command here.

DVC runs a stage's command by `$SHELL -c COMMAND`, and dvc.yaml's commands are the same on any machine. So where the
work pool gives hosts (DIT_HOSTS, see `manifests.wanted`), the walker names this file as DVC's shell: what is stale, what
the cache has, what is recorded afterwards stays DVC's business, and a cancelled run cancels the Job.
"""

import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # and not this file's own folder

from dit.pipeline import ACCELERATED, SHARED
from flows import hosts
from flows.manifests import wanted

# Of the environment, what a stage needs elsewhere. It stands in the Job for all to read: secrets are the pods' own.
CARRIED = re.compile(
    r"DIT_(?!HOST|IMAGE).*|MLFLOW_TRACKING_URI|MLFLOW_REGISTRY_URI|AWS_ENDPOINT_URL|AWS_(DEFAULT_)?REGION"
)
EXIT = {"ran": 0, "failed": 1, "interrupted": 128 + signal.SIGTERM, "lost": 128 + signal.SIGKILL}


def shell(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What DVC's environment needs where stages run on other hosts; empty where they run here."""
    return {"SHELL": str(Path(__file__).resolve())} if environment.get("DIT_HOSTS", "") not in ("", "0") else {}


def main(words: list[str]) -> int:
    """`-c COMMAND`, as any shell; returns the exit status."""
    command = words[words.index("-c") + 1]
    stage = re.fullmatch(r"python -m dit\.stages\.(\w+)", command)
    given = wanted(Path.cwd()) if stage and stage[1] in ACCELERATED else None
    if given is None:
        os.execv("/bin/sh", ["sh", "-c", command])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to end the Job, as by Ctrl-C
    count, settings = given
    carried = {name: value for name, value in os.environ.items() if CARRIED.fullmatch(name)}
    status, message = hosts.run_on_hosts(
        stage[1],
        Path.cwd(),
        lambda line: print(line, flush=True),
        hosts=count if stage[1] in SHARED else 1,
        settings=settings,
        environment=carried,
    )
    if message:
        print(f"{stage[1]}: {message}", file=sys.stderr)
    return EXIT[status]


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"hosts: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
