"""Several processes that share one piece of work, as torchrun starts them: who does what, and how it comes together.

Work is cut into blocks by their numbers alone, and a process takes whole blocks, so that what is made does not depend
on how many processes there are. Without torchrun there is one process, and nothing here does anything.
"""

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")
# Processes wait for each other as long as the slowest works: only a dead one ends the waiting, and that torchrun sees.
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class World:
    """This process's number among `size`."""

    rank: int
    size: int

    @property
    def main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def mine(self, blocks: Sequence[T]) -> Sequence[T]:
        """This process's part: every `size`-th block, from the `rank`-th."""
        return blocks[self.rank :: self.size]

    def gather(self, part: Any) -> list[Any] | None:
        """Every process's `part` (anything that pickles), by rank, at the main process; None at the others."""
        if self.size == 1:
            return [part]
        import torch.distributed

        parts = [None] * self.size if self.main else None
        torch.distributed.gather_object(part, parts, group=_group())
        return parts

    def share(self, told: Any) -> Any:
        """What the main process has to tell, at every process."""
        if self.size == 1:
            return told
        import torch.distributed

        box = [told]
        torch.distributed.broadcast_object_list(box, group=_group())
        return box[0]

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.gather(None)
        self.share(None)


def blocks(count: int, size: int) -> list[range]:
    """The numbers below `count` in order, `size` at a time; the last block may be shorter."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def world() -> World:
    """This process among those that torchrun started (RANK, WORLD_SIZE); the only one without it."""
    return World(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def local_rank() -> int:
    """This process's number on its machine: which accelerator is its own."""
    return int(os.environ.get("LOCAL_RANK", 0))


@cache
def _group() -> Any:
    """The processes' way to talk, over the CPU whatever the device: what is gathered here is small or in files."""
    import torch.distributed

    if torch.distributed.is_initialized():
        return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    atexit.register(_end)
    return torch.distributed.group.WORLD


def _end() -> None:
    # A group that lives on into the interpreter's end takes the process down with it, now and then.
    import torch.distributed

    _group.cache_clear()
    torch.distributed.destroy_process_group()
