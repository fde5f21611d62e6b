"""What the machine is: device, precision, threads, and all that accelerators differ in. Settings that change no weights
live here, in `run`."""

import math
import os
import re
import resource
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dit.parallel import local_rank, local_size

TPUS = {"v3": "TPU v3", "v4": "TPU v4", "v5litepod": "TPU v5e", "v5p": "TPU v5p", "v6e": "TPU v6e"}  # by Google's types

NOT_NEGATIVE = (
    *("num_threads", "device_batch_size", "preview_every_steps", "score_every_steps", "processes", "restarts"),
    *("cache_gb", "time_limit_minutes", "stage_retries", "retry_seconds"),
)
CGROUP = Path("/sys/fs/cgroup")
LIMITS = ("memory.max", "memory/memory.limit_in_bytes", "memory.limit_in_bytes")  # version 2; 1, as it is mounted


@dataclass(frozen=True)
class RunConfig:
    """How the work is done, not what is computed: no stage becomes stale by a change here."""

    device: Literal["auto", "cpu", "cuda", "mps", "tpu"] = "auto"
    processes: int = 0  # of a stage on this machine; 0 = one for each accelerator, one on a CPU
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"  # auto: fsdp where a copy of all a process holds would not fit
    restarts: int = 3  # of a stage's processes, when one of several is lost
    num_threads: int = 1  # per process, on a CPU; 0 = as many as there are cores
    device_batch_size: int = 0  # images in one forward-backward pass; 0 = the whole global batch
    compile: Literal["auto", "on", "off"] = "auto"  # auto: where the work ahead repays it
    activation_checkpointing: bool = False  # less memory for activations, a third more work
    deterministic: bool = False  # the same bits each time on an accelerator too, slower
    latents: Literal["auto", "memory", "mapped", "streamed"] = "auto"
    latents_from: str | None = None  # s3://bucket/prefix that holds what artifacts/encode would, for streamed
    cache_gb: float = 50.0  # of streamed shards kept on this machine's disk
    log_every_steps: int = 50
    checkpoint_every_steps: int = 400
    keep_checkpoints: int = 2
    mirror: str | None = None  # s3://bucket/prefix or a folder that gets each state too; null = none
    time_limit_minutes: float = 0.0  # training saves and stops before it; 0 = none (a batch system's own is known)
    max_bad_steps: int = 10  # skipped in a row, because loss or gradient is not finite, until training gives up
    score_every_steps: int = 0  # the held-out loss of the average; 0 = never
    preview_every_steps: int = 0  # 0 = none but the last
    experiment: str = "dit"
    stage_retries: int = 3  # of a flow: how often a stage that was lost, or out of reach of something, is tried again
    retry_seconds: float = 10.0  # before the first of them; each later wait is six times as long

    def __post_init__(self) -> None:
        for name in ("log_every_steps", "checkpoint_every_steps", "keep_checkpoints", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_threads > 4 * (os.cpu_count() or 1):
            raise ValueError(
                f"num_threads must be at most {4 * (os.cpu_count() or 1)} on this machine, got {self.num_threads}"
            )
        for name in ("latents_from", "mirror"):
            told = getattr(self, name)
            if told is not None and (not told.strip() or not re.match(r"(?!\w+:)|s3://[^/]", told)):
                raise ValueError(f"{name} must be null, a folder or s3://bucket/prefix, got {told!r}")
        for name in NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")


def start(run: RunConfig) -> torch.device:
    """Choose the device, the number of threads and how float32 is multiplied; call once, before any tensor work."""
    device = pick_device(run.device)
    if device.index:
        torch.accelerator.set_device_index(device.index)  # processes exchange what lies on the current one
    if device.type != "cpu" and run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when its first product is made
        torch.use_deterministic_algorithms(True)
    if device.type == "cuda":
        # TensorFloat-32: the published models were trained and drawn with it, and in full float32 a step takes some times
        # as long.
        torch.set_float32_matmul_precision("high")
    if device.type == "cpu":
        # One thread is the better default on a small machine: matrix products here are small, and a second
        # thread that has to wait for a busy core costs more than it ever saves.
        torch.set_num_threads(run.num_threads or max(1, (os.cpu_count() or 1) // local_size()))
    return device


def pick_device(wanted: str) -> torch.device:
    """The device named, or the best there is for `auto`; of several processes each its own. Raises ValueError where the machine lacks it."""
    kind, count = accelerators(wanted)
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, local_rank() % count)


def accelerators(wanted: str) -> tuple[str, int]:
    """The type of device that is named, or the best there is for `auto`, and how many of it are visible; a CPU is one.

    Raises ValueError where the machine lacks it.
    """
    if wanted == "tpu":
        try:
            import torch_tpu  # noqa: F401 (it makes the device known to torch)
        except ImportError:
            raise ValueError("run.device: tpu needs torch_tpu: pip install 'dit-pipeline[tpu]'") from None
    available = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if wanted == "cpu" or (wanted == "auto" and available is None):
        return "cpu", 1
    if available is None or (wanted != "auto" and available.type != wanted):
        raise ValueError(f"run.device: this machine has no {wanted!r}: use auto or cpu")
    return available.type, torch.accelerator.device_count()


def autocast(device: torch.device, precision: Literal["fp32", "bf16"]) -> AbstractContextManager:
    """Mixed precision as torch does it: bf16 where it is safe, no gradient scaling needed."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def main_memory() -> int:
    """Bytes of this machine's own memory, or what a container may take of it."""
    import psutil

    told = [psutil.virtual_memory().total]
    for name in LIMITS:
        with suppress(OSError, ValueError):  # no container, or "max"
            told.append(int((CGROUP / name).read_text()))
    return min(told)


def device_name(device: torch.device) -> str | None:
    """What its maker calls the device; None of a CPU, and where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "tpu":  # TPU_ACCELERATOR_TYPE: "v6e-8", set on each TPU host
        return TPUS.get(os.environ.get("TPU_ACCELERATOR_TYPE", "").partition("-")[0])
    return None


def memory_bytes(device: torch.device) -> float | None:
    """All the memory that a device has of its own; None of a CPU or Apple's, and where nothing tells."""
    if device.type in ("cpu", "mps"):
        return None
    try:
        return torch.accelerator.get_memory_info(device)[1]
    except (RuntimeError, NotImplementedError):
        return None


def held_bytes(device: torch.device) -> float:
    """The most memory that this process has held: its device's, or on a CPU its own."""
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    try:  # on Linux ru_maxrss begins with the size of the process that started this one
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def pins(device: torch.device) -> bool:
    """Whether copies between pinned memory and the device go on beside the computation."""
    return device.type == "cuda"


def copy_stream(device: torch.device) -> torch.Stream | None:
    """A queue of the device's own for copies; None where there is no such thing."""
    return torch.cuda.Stream(device) if pins(device) else None


def queued_on(stream: torch.Stream | None) -> AbstractContextManager:
    """What is begun within is queued there, if it is a queue."""
    return torch.cuda.stream(stream) if stream else nullcontext()


def take_over(tensors: list[torch.Tensor], arrived: torch.Event, device: torch.device) -> None:
    """Have what the device does next wait for tensors that another queue has made: the device waits, the host does not."""
    stream = torch.cuda.current_stream(device)
    stream.wait_event(arrived)
    for tensor in tensors:
        tensor.record_stream(stream)


def mark(device: torch.device) -> Callable[[], None]:
    """What is returned waits until the device has done all that is queued now."""
    if not pins(device):
        return lambda: None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event.synchronize


def tell_tpu_hosts() -> None:
    """Set what the processes of a TPU host must know of each other, where torch_tpu is what works here."""
    if "torch_tpu" in sys.modules and getattr(torch.accelerator.current_accelerator(), "type", "") == "tpu":
        torch.tpu.distributed.set_tpu_launch_env()
