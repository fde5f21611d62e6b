"""What long work says of itself: how far, how fast, how long still."""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

FILE = "DIT_PROGRESS"  # the variable that names a file for whoever watches from outside, such as a flow
NOTE_SECONDS = 2.0  # at most so often it is written
DAY = 86_400  # seconds


class Progress:
    """A line now and then, and the same as JSON in the file that DIT_PROGRESS names, if any."""

    def __init__(
        self,
        what: str,
        total: int,
        unit: str = "images",
        every_seconds: float = 5.0,
        say: Callable[[str], None] = print,
        before: int = 0,  # done by an earlier process: it counts, and not for the rate
    ):
        self.what, self.total, self.unit, self.every_seconds, self.say = what, total, unit, every_seconds, say
        self.done = self.before = before
        self.started = self.said = time.monotonic()
        self.file, self.noted = os.environ.get(FILE), float("-inf")

    def __call__(self, count: int, note: str = "") -> None:
        """`count` more are done."""
        self.done += count
        now = time.monotonic()
        due, last = now - self.said >= self.every_seconds, self.done >= self.total
        noting = self.file and (last or now - self.noted >= NOTE_SECONDS)
        if not (due or last or noting):
            return
        rate = (self.done - self.before) / max(now - self.started, 1e-9)
        eta = (self.total - self.done) / max(rate, 1e-9)
        if due or last:
            self.said = now
            self.say(
                f"{self.what}: {self.done}/{self.total} {self.unit}, {rate:.1f} {self.unit}/s, {clock(eta)} left{note}"
            )
        if noting:
            self.noted = now
            self._note(Path(self.file), rate, eta, note)

    def _note(self, file: Path, rate: float, eta: float, note: str) -> None:
        told = {"what": self.what, "done": self.done, "total": self.total, "unit": self.unit, "rate": rate}
        told |= {"eta_seconds": max(eta, 0.0), "note": note.strip()}
        told |= {"images_per_second": rate if self.unit == "images" else None, "time": time.time()}
        unfinished = file.with_name(f".{file.name}.{os.getpid()}")
        with suppress(OSError):  # nothing depends on it, so it is not brought safely to the disk either
            unfinished.write_text(json.dumps(told))
            os.replace(unfinished, file)


def clock(seconds: float) -> str:
    """Seconds as a person reads them: 42s, 3m05s, 2h07m, 3d04h, 153 days, 1.2 years, 419 years."""
    seconds = round(seconds)
    if seconds >= 365 * DAY:
        years = seconds / (365.25 * DAY)
        return f"{years:.1f} years" if years < 9.95 else f"{years:,.0f} years"
    if seconds >= 100 * DAY:
        return f"{seconds // DAY} days"
    for unit, size, lower, lower_size in (("d", DAY, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // lower_size:02d}{lower}"
    return f"{seconds}s"
