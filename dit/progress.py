"""What long work says of itself: how far, how fast, how long still."""

import time
from collections.abc import Callable


class Progress:
    """A line now and then."""

    def __init__(
        self,
        what: str,
        total: int,
        unit: str = "images",
        every_seconds: float = 5.0,
        say: Callable[[str], None] = print,
    ):
        self.what, self.total, self.unit, self.every_seconds, self.say = what, total, unit, every_seconds, say
        self.done, self.started, self.said = 0, time.monotonic(), time.monotonic()

    def __call__(self, count: int, note: str = "") -> None:
        """`count` more are done."""
        self.done += count
        now = time.monotonic()
        if now - self.said >= self.every_seconds or self.done >= self.total:
            self.said = now
            rate = self.done / max(now - self.started, 1e-9)
            eta = (self.total - self.done) / max(rate, 1e-9)
            self.say(
                f"{self.what}: {self.done}/{self.total} {self.unit}, {rate:.1f} {self.unit}/s, {clock(eta)} left{note}"
            )


def clock(seconds: float) -> str:
    """Seconds as a person reads them: 42s, 3m05s, 2h07m, 3d04h."""
    seconds = round(seconds)
    for unit, size, lower, lower_size in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // lower_size:02d}{lower}"
    return f"{seconds}s"
