"""Ports for servers that a test starts a while after it has chosen them."""

import itertools
import os
import re
import socket

FIRST, SHARE, SHARES = 12_000, 500, 40  # below 32768, from where the system gives ports to whoever asks for any
_worker = int(re.sub(r"\D", "", os.environ.get("PYTEST_XDIST_WORKER", "")) or 0)
_numbers = itertools.count(os.getpid())  # another run of the tests begins elsewhere


def free_port() -> int:
    """A port that nobody listens on, and that nobody else is told meanwhile: each process of a parallel run has its own
    share, and no port is told twice in a row."""
    while True:
        port = FIRST + SHARE * (_worker % SHARES) + next(_numbers) % SHARE
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
