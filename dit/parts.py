"""Tensors of which each process may have a part: copied off the device, written by all into one folder, read by any.

The parts are DTensors, the format is torch.distributed.checkpoint's in safetensors: a file of each process that tells
where in the whole tensors its parts belong. So what one number of processes wrote, another number reads.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.paths import file_sha256
from dit.runtime import mark, pins

Shapes = dict[str, tuple[torch.Size, torch.dtype]]


def sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; asked without importing what that takes."""
    return hasattr(tensor, "device_mesh")


class Staging:
    """Copies of tensors in the CPU's memory, which is taken once and used again."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._meshes: dict[Any, Any] = {}

    def copied(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], Any]]:
        """This process's part of each tensor, a DTensor where it was one; and what waits until they are filled.

        From a CUDA device the copies are queued behind the work that is queued already, and the host goes on: what is
        queued after them may change the tensors.
        """
        buffers, copies, device = {}, {}, torch.device("cpu")
        for name, tensor in tensors.items():
            part = tensor.detach().to_local() if sharded(tensor) else tensor.detach()
            pinned, buffer = pins(part.device), self._buffers.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (part.shape, part.dtype):
                buffer = torch.empty(part.shape, dtype=part.dtype, pin_memory=pinned)
            buffers[name] = buffer.copy_(part, non_blocking=pinned)
            copies[name] = self._like(tensor, buffer) if sharded(tensor) else buffer
            device = part.device if pinned else device
        self._buffers = buffers
        return copies, mark(device)

    def _like(self, tensor: Any, part: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        layout = self._on_cpu(tensor.device_mesh), tensor.placements
        return DTensor.from_local(part, *layout, run_check=False, shape=tensor.shape, stride=tensor.stride())

    def _on_cpu(self, mesh: Any) -> Any:
        """The same processes, as what holds tensors on the CPU. All of them come here in the same order."""
        from torch.distributed.device_mesh import DeviceMesh

        if mesh.device_type == "cpu":
            return mesh
        if mesh not in self._meshes:
            self._meshes[mesh] = DeviceMesh("cpu", mesh.mesh)
        return self._meshes[mesh]


def write(folder: Path, copies: dict[str, Tensor], rank: int, group: Any) -> dict[str, str]:
    """Write all processes' parts; every process of `group` calls it. The names and sha256 of this one's files.

    A plain tensor is the same at all processes, and one of them writes it. Raises what it failed with at whichever
    process, such as OSError.
    """
    from torch.distributed import checkpoint

    writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        checkpoint.save(copies, storage_writer=writer, process_group=group)
    except checkpoint.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None
    return {file.name: file_sha256(file) for file in folder.glob(f"shard-{rank + 1:05d}-*.safetensors")}


def read(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, plain or DTensors, in place. Each process reads what it needs, and nothing is sent."""
    from torch.distributed import checkpoint

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that is meant
        checkpoint.load(tensors, storage_reader=_reader(folder), no_dist=True)


def shapes(folder: Path) -> Shapes:
    """Shape and dtype of every whole tensor."""
    found = _reader(folder).read_metadata().state_dict_metadata
    return {name: (told.size, told.properties.dtype) for name, told in found.items()}


def fill(tensor: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into a plain one, or this process's part of it into a DTensor; nothing is sent."""
    if not sharded(tensor):
        tensor.copy_(whole)
        return
    from torch.distributed.tensor import distribute_tensor

    part = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.to_local().copy_(part.to_local())


def _reader(folder: Path) -> Any:
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(folder))
