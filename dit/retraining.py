"""When new images are worth a training, and what is new: the settings of the `retrain` flow, and two listings compared."""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from dit.sources import Listing, Row


@dataclass(frozen=True)
class RetrainConfig:
    """When the `retrain` flow trains, and from what. In no stage's signature: nothing becomes stale by a change here."""

    min_new_images: int = 1  # new and changed ones; fewer, and nothing is done
    quiet_seconds: float = 60.0  # the source must stay as it is for so long: an upload may be in progress
    max_quiet_hours: float = 6.0  # the longest wait for that; what is there then is trained on
    start_from: Literal["champion", "scratch"] = "champion"

    def __post_init__(self) -> None:
        if self.min_new_images < 1:
            raise ValueError(f"min_new_images must be at least 1, got {self.min_new_images}")
        for name in ("quiet_seconds", "max_quiet_hours"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True)
class Changes:
    """How many images of each class came, were replaced, and went; the class "" where there are no classes.

    `restarted`: whether the source, or its kind of labels, is another, so that all images count as new.
    """

    new: Counter[str]
    changed: Counter[str]
    gone: Counter[str]
    restarted: bool = False

    @property
    def total(self) -> int:
        """How many images are to be learned from that were not before: those that are new or changed."""
        return self.new.total() + self.changed.total()

    def __bool__(self) -> bool:
        return bool(self.total or self.gone.total())


def compare(before: Listing | None, now: Listing) -> Changes:
    """What changed from one listing to a later one, by key. A changed image is of another content, or of another class."""
    restarted = before is not None and (before.source, before.labels) != (now.source, now.labels)
    old = {} if before is None or restarted else {row.key: (row.sha256, class_of(before, row)) for row in before.rows}
    new, changed = Counter[str](), Counter[str]()
    for row in now.rows:
        name = class_of(now, row)
        known = old.pop(row.key, None)
        if known is None:
            new[name] += 1
        elif known != (row.sha256, name):
            changed[name] += 1
    return Changes(new, changed, Counter(name for _, name in old.values()), restarted)


def class_of(listing: Listing, row: Row) -> str:
    """The name of an image's class; "" where there are no classes."""
    return listing.classes[row.label] if listing.classes else ""
