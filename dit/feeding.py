"""Batches on the device, step after step, gathered by a thread while the device works on the ones before."""

import time
from collections.abc import Callable, Collection, Iterator
from queue import Full, Queue
from threading import Event, Thread
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dit import runtime
from dit.dataset import LatentDataset

AHEAD = 2  # batches that wait for the device
LOOK_SECONDS = 0.1  # how soon a thread that waits for room sees that it shall end


class Feed(Iterator[dict[str, Tensor]]):
    """The batches of `steps`, in their order, on the device. Use it in a `with`, or close it.

    Args:
        part: the rows of each global batch that this process is for.
        wanted: says of a step which tensors it needs; None = all.

    Where latents are in memory and the device is the CPU there is no thread: it would take the time that it saves. What
    the thread raises is raised by the loop's next step.
    """

    def __init__(
        self,
        data: LatentDataset,
        steps: range,
        part: slice = slice(None),
        device: torch.device | str = "cpu",
        *,
        wanted: Callable[[int], Collection[str]] | None = None,
    ):
        self.data, self.part, self.device, self.wanted = data, part, torch.device(device), wanted
        self.waited = 0.0  # seconds that the loop spent here
        self._steps = iter(steps)
        self._copies = runtime.copy_stream(self.device)
        self._ready: Queue[Any] = Queue(AHEAD)
        self._ending = Event()
        self._thread: Thread | None = None
        if self.device.type != "cpu" or not data.in_memory:
            self._thread = Thread(target=self._work, name="feed", daemon=True)
            self._thread.start()

    def __next__(self) -> dict[str, Tensor]:
        began = time.perf_counter()
        try:
            return self._next()
        finally:
            self.waited += time.perf_counter() - began

    def _next(self) -> dict[str, Tensor]:
        if self._thread is None:
            if self._ending.is_set():
                raise StopIteration
            return self._gathered(next(self._steps))
        ready = self._ready.get()
        if isinstance(ready, BaseException):
            self.close()
            raise ready
        batch, arrived = ready
        if arrived is not None:
            runtime.take_over([*batch.values()], arrived, self.device)
        return self._on_device(batch)

    def _gathered(self, step: int) -> dict[str, Tensor]:
        keys = self.wanted(step) if self.wanted else None
        return self.data.batch(step, self.part, keys=keys, pin=self._copies is not None)

    def _on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensor.to(self.device, non_blocking=self._copies is not None) for key, tensor in batch.items()}

    def _work(self) -> None:
        try:
            for step in self._steps:
                if self._ending.is_set():
                    return
                with runtime.queued_on(self._copies):  # beside the computation
                    batch, arrived = self._gathered(step), None
                    if self._copies is not None:
                        batch, arrived = self._on_device(batch), self._copies.record_event()
                self._put((batch, arrived))
            self._put(StopIteration())
        except BaseException as error:
            self._put(error)

    def _put(self, ready: Any) -> None:
        while not self._ending.is_set():
            try:
                return self._ready.put(ready, timeout=LOOK_SECONDS)
            except Full:
                pass

    def close(self) -> None:
        """End the thread, and what the data fetch ahead; no batch comes after this."""
        self._ending.set()
        self.data.close()
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(LOOK_SECONDS)
            self.data.close()  # again: it may just have begun to wait for something
        self._thread = None
        while not self._ready.empty():
            self._ready.get_nowait()

    def __enter__(self) -> "Feed":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
