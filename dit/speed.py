"""How fast a training goes, by what its work and its device promise. No result depends on it."""

import time

import torch

from dit.model import DiT
from dit.runtime import device_name, held_bytes


class Speed:
    """How fast it goes: figures for the log, which no two runs have alike."""

    def __init__(
        self,
        device: torch.device,
        global_batch_size: int,
        *,
        step: int = 0,
        flops_per_image: float | None = None,  # of training: dit.cost's multiply-accumulates times six
        peak_flops: float | None = None,  # of all devices together; None = not known
    ):
        self.device, self.global_batch_size = device, global_batch_size
        self.flops_per_image, self.peak_flops = flops_per_image, peak_flops
        self._step, self._waited, self._time = step, 0.0, time.monotonic()

    def row(self, step: int, waited: float = 0.0) -> dict[str, float]:
        """Since the last row: images_per_second; mfu, the share of the devices' peak (where it is known); data_wait, the
        share of the time that the loop waited for data, of whose seconds `waited` is the sum from the beginning; and
        memory_gb, the most that this process has held so far."""
        now = time.monotonic()
        seconds = max(now - self._time, 1e-9)
        told = {"images_per_second": (step - self._step) * self.global_batch_size / seconds}
        if self.flops_per_image and self.peak_flops:
            told["mfu"] = told["images_per_second"] * self.flops_per_image / self.peak_flops
        told |= {"data_wait": (waited - self._waited) / seconds, "memory_gb": held_bytes(self.device) / 1e9}
        self._step, self._waited, self._time = step, waited, now
        return told


def flops_per_image(network: DiT) -> float:
    """Operations of training on one image: each multiply-accumulate is two, and the backward pass costs two forward."""
    from dit.cost import macs

    shape = {"input_size": network.input_size, "in_channels": network.in_channels}
    return 6.0 * macs(network.config, **shape, condition_shape=network.condition_shape)


def peak_flops(device: torch.device) -> float | None:
    """Operations a second that this process's device could do: by its data sheet, in bf16 whatever the precision; of a
    CPU, one thread's matrix products, timed (0.2 s), times the threads. None where it is not known."""
    from dit.estimate import device_named
    from dit.expectations import look

    if device.type == "cpu":
        threads = torch.get_num_threads()
        try:
            return threads * look("cpu").flops
        finally:
            torch.set_num_threads(threads)  # `look` takes one
    try:
        return device_named(device_name(device) or "").peak_flops
    except ValueError:
        return None
