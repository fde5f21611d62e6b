"""Several processes that share one piece of work, as torchrun starts them: who does what, and how it comes together.

Work is cut into blocks by their numbers alone, and a process takes whole blocks, so that what is made does not depend
on how many processes there are. Without torchrun there is one process, and nothing here does anything.
"""

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
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

    def agree(self, flag: bool) -> bool:
        """Whether any process says so; waits for all of them (see Agreement for what does not wait)."""
        return self.share(any(self.gather(flag) or []))

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


def local_size() -> int:
    """How many processes share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


class Agreement:
    """Whether any process has raised its flag, asked again and again without waiting: one byte, over the CPU.

    Every process makes it, and asks, equally often and in the same order. What is answered is the state of the call
    before, so that the answer is there by the time it is asked for: no step of a training waits for it.
    """

    def __init__(self) -> None:
        self._alone, self._pending = world().size == 1, None
        if not self._alone:
            import torch.distributed

            _group()
            # Its own group: what is on its way here must not get between what others gather and share.
            self._group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)

    def ask(self, flag: bool) -> bool:
        """Whether any flag was up at the previous call, the same at every process; with one process, whether it is."""
        if self._alone:
            return flag
        import torch.distributed

        before = self.settle()
        told = torch.tensor([flag], dtype=torch.uint8)
        maximum = torch.distributed.ReduceOp.MAX
        self._pending = told, torch.distributed.all_reduce(told, maximum, self._group, async_op=True)
        return before

    def settle(self) -> bool:
        """What the last call asked: to be awaited before the processes part."""
        if self._pending is None:
            return False
        told, work = self._pending
        self._pending = None
        work.wait()
        return bool(told)


# Beside gloo, which is how the processes talk over the CPU, what an accelerator's memory is exchanged by.
_BACKENDS = {"cuda": "cuda:nccl", "xpu": "xpu:xccl", "tpu": "tpu:tpu_dist"}


def device_group(device: Any) -> Any:
    """The group of all processes that exchanges what lies on a device of this type, and on the CPU; None with one process.

    It is torch's default group, made once, by whoever asks first: the device's side of it can't be added later.
    Raises ValueError where it was made for another device.
    """
    if world().size == 1:
        return None
    import torch
    import torch.distributed

    kind = torch.device(device).type
    if not torch.distributed.is_initialized():
        backend = ",".join(filter(None, ["cpu:gloo", _BACKENDS.get(kind)]))
        torch.distributed.init_process_group(backend, timeout=PATIENCE)
        atexit.register(_end)
    group = torch.distributed.group.WORLD
    if kind in _BACKENDS and torch.device(kind) not in group._device_types:
        raise ValueError(f"run.device: the processes were joined without {kind}: name the device from the start")
    return group


def _group() -> Any:
    """The processes' way to talk, over the CPU whatever the device: what is gathered here is small or in files."""
    return device_group("cpu")


def _end() -> None:
    # A group that lives on into the interpreter's end takes the process down with it, now and then.
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
