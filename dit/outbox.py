"""A queue in front of a service that may be slow or gone: whoever puts something in never waits.

A thread sends, in order. What fails is said once, kept, tried again every minute and a last time at the end. A job
that fails alone is no sign that the service is gone: it holds up nothing else, and after some tries it is dropped.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

FLUSH_SECONDS = 5.0  # between two batches of points
RETRY_SECONDS = 60.0  # after a failure, until the next attempt
TRIES = 5  # of one job
BATCH = 1000  # points at a time: the most that MLflow takes
MAX_POINTS = 200_000  # kept for a service that is away


class Point(NamedTuple):
    """One value of a curve, in the order of MLflow's `Metric`."""

    key: str
    value: float
    timestamp: int  # milliseconds since 1970
    step: int


@dataclass(eq=False)
class _Job:
    call: Callable[[], None]
    failures: int = 0
    not_before: float = 0.0  # seconds of the monotonic clock


class Outbox:
    """Points, sent up to BATCH at a time by `send`, and jobs, which are called. `say` is told of a first failure."""

    def __init__(self, send: Callable[[list[Point]], None], say: Callable[[Exception], None]):
        self._send_points, self._say = send, say
        self._points: list[Point] = []
        self._jobs: list[_Job] = []
        self._last: Callable[[], None] | None = None
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._closing = self._dropped = False
        self._away = False  # the service, as it seems: only then everything waits
        self._said = False  # the failure, until all is well again
        self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)
        self._thread.start()

    def add(self, points: list[Point]) -> None:
        """Takes microseconds."""
        with self._lock:
            if len(self._points) < MAX_POINTS:
                self._points += points
            full = len(self._points) >= BATCH and not self._away
        if full:
            self._wake.set()

    def do(self, job: Callable[[], None]) -> None:
        """Have `job` called after the jobs before it."""
        with self._lock:
            self._jobs.append(_Job(job))

    def close(self, last: Callable[[], None], seconds: float) -> bool:
        """Send what is left, then call `last` in any case, waiting at most so long. Whether all of it went out."""
        if not self._closing:
            self._last, self._closing = last, True
            self._wake.set()
        self._thread.join(seconds)
        return not (self._thread.is_alive() or self._away or self._jobs or self._dropped)

    def _work(self) -> None:
        closing = False
        while not closing:
            self._wake.wait(RETRY_SECONDS if self._away else FLUSH_SECONDS)
            self._wake.clear()
            closing = self._closing
            try:
                try:
                    self._send(closing)
                finally:
                    if closing and self._last:
                        self._last()
                self._away = False
                self._said = any(job.failures for job in self._jobs)
            except Exception as error:  # of whatever library the service is reached by
                self._away = True
                self._tell(error)

    def _send(self, closing: bool) -> None:
        """Raises where the service seems to be away: points do not go out, or two jobs fail one after the other."""
        while self._points:
            batch = self._points[:BATCH]
            self._send_points(batch)
            with self._lock:
                del self._points[: len(batch)]
        failed_before = False
        for job in [job for job in self._jobs if closing or job.not_before <= time.monotonic()]:
            try:
                job.call()
                failed = False
            except Exception as error:
                failed = True
                job.failures, job.not_before = job.failures + 1, time.monotonic() + RETRY_SECONDS
                if failed_before and job.failures < TRIES:
                    raise
                self._tell(error)
            dropped = failed and job.failures >= TRIES
            self._dropped |= dropped
            if dropped or not failed:
                with self._lock:
                    self._jobs.remove(job)
            failed_before = failed

    def _tell(self, error: Exception) -> None:
        if not self._said:
            self._said = True
            self._say(error)
