"""A queue in front of a service that may be slow or gone: whoever puts something in never waits.

A thread sends, in order. What fails is said once, kept, tried again every minute and a last time at the end.
"""

import threading
from collections.abc import Callable
from typing import NamedTuple

FLUSH_SECONDS = 5.0  # between two batches of points
RETRY_SECONDS = 60.0  # after a failure, until the next attempt
BATCH = 1000  # points at a time: the most that MLflow takes
MAX_POINTS = 200_000  # kept for a service that is away


class Point(NamedTuple):
    """One value of a curve, in the order of MLflow's `Metric`."""

    key: str
    value: float
    timestamp: int  # milliseconds since 1970
    step: int


class Outbox:
    """Points, sent up to BATCH at a time by `send`, and jobs, which are called. `say` is told of a first failure."""

    def __init__(self, send: Callable[[list[Point]], None], say: Callable[[Exception], None]):
        self._send_points, self._say = send, say
        self._points: list[Point] = []
        self._jobs: list[Callable[[], None]] = []
        self._last: Callable[[], None] | None = None
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._closing = self._failing = False
        self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)
        self._thread.start()

    def add(self, points: list[Point]) -> None:
        """Takes microseconds."""
        with self._lock:
            if len(self._points) < MAX_POINTS:
                self._points += points
            full = len(self._points) >= BATCH and not self._failing
        if full:
            self._wake.set()

    def do(self, job: Callable[[], None]) -> None:
        """Have `job` called after the jobs before it."""
        with self._lock:
            self._jobs.append(job)

    def close(self, last: Callable[[], None], seconds: float) -> bool:
        """Send what is left, then call `last`, waiting at most so long. Whether all of it went out."""
        if not self._closing:
            self._last, self._closing = last, True
            self._wake.set()
        self._thread.join(seconds)
        return not (self._thread.is_alive() or self._failing)

    def _work(self) -> None:
        closing = False
        while not closing:
            self._wake.wait(RETRY_SECONDS if self._failing else FLUSH_SECONDS)
            self._wake.clear()
            closing = self._closing
            try:
                self._send()
                if closing and self._last:
                    self._last()
                self._failing = False
            except Exception as error:  # of whatever library the service is reached by
                if not self._failing:
                    self._say(error)
                self._failing = True

    def _send(self) -> None:
        while self._points:
            batch = self._points[:BATCH]
            self._send_points(batch)
            with self._lock:
                del self._points[: len(batch)]
        failed: list[Callable[[], None]] = []
        problem = None
        while self._jobs and len(failed) < 2:  # one that never works holds up nobody; two mean that nothing would
            try:
                self._jobs[0]()
            except Exception as error:
                failed.append(self._jobs[0])
                problem = error
            with self._lock:
                del self._jobs[0]
        if problem:
            with self._lock:
                self._jobs[:0] = failed
            raise problem
