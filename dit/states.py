"""The state that a training goes on from: how it lies on disk, and how the last whole one is found by its checksums.

step-00000400.safetensors holds the tensors of one process, or of several that all have the same. Where each process has
a part (FSDP), the folder step-00000400/ holds everybody's (parts.py), for any number of processes to read. The sidecar
step-00000400.json comes last, with the checksum of every file: a state counts once that is there. All of it is
safetensors and JSON: nothing is pickled, nothing runs code when it is opened. saving.py writes it.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit import parts
from dit.parallel import World
from dit.paths import file_sha256, write_json

FORMAT = "dit-state/1"
BESIDE = "snapshots"  # the averages that are kept along the way lie there, in the folder of the states


@dataclass
class TrainingState:
    """All that training needs to go on at `step`."""

    step: int
    tensors: Mapping[str, Tensor]  # live: on any device, DTensors where processes have parts of them
    values: dict[str, Any]  # what JSON can hold; a float comes back with all of its bits


@dataclass(frozen=True)
class SavedState:
    """A state on disk. It can be handed to another process; its tensors are read when they are asked for."""

    step: int
    values: dict[str, Any]
    path: Path  # the file, or the folder of several processes' parts
    files: dict[str, str] = field(default_factory=dict)  # sha256 by name, as seen from the folder that `path` is in

    @property
    def sidecar(self) -> Path:
        return self.path.parent / f"{stem(self.step)}.json"

    def read(self, prefix: str = "") -> dict[str, Tensor]:
        """The whole tensors whose names begin with `prefix`, by the rest of their names, on the CPU."""
        if self.path.is_dir():
            wanted = {name: told for name, told in parts.shapes(self.path).items() if name.startswith(prefix)}
            tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in wanted.items()}
            parts.read(self.path, tensors)
        else:
            with _opened(self.path) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    @torch.no_grad()
    def load_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill these tensors in place, each process its own; plain ones and DTensors, whatever the state was made of.

        What the state has beyond them is passed over. Raises ValueError, before any is changed, where one is missing
        in the state, or has another shape or dtype there.
        """
        kept, wanted = self._shapes(), {name: tensor.detach() for name, tensor in tensors.items()}
        for name, tensor in wanted.items():
            if kept.get(name) != (tensor.shape, tensor.dtype):
                there = _told(*kept[name]) if name in kept else "not there"
                told = f"{name} should be {_told(tensor.shape, tensor.dtype)} and is {there}"
                raise ValueError(f"{self.path} does not fit this training: {told}")
        if self.path.is_dir():
            return parts.read(self.path, wanted)
        with _opened(self.path) as file:
            for name, tensor in wanted.items():
                parts.fill(tensor, file.get_tensor(name))

    def _shapes(self) -> parts.Shapes:
        if self.path.is_dir():
            return parts.shapes(self.path)
        with _opened(self.path) as file:  # mapped, and so not read for this
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def latest_state(folder: Path, world: World | None = None) -> SavedState | None:
    """The last state that is whole; those that are torn, or another training's, are named and passed over.

    With a `world` the main process looks, and all get what it found.
    """
    if world is not None and world.size > 1:
        return world.share(latest_state(folder) if world.main else None)
    for step in reversed(steps(folder)):
        try:
            return checked(parsed((folder / f"{stem(step)}.json").read_bytes(), folder, step))
        except (ValueError, OSError) as error:
            print(f"{error}: passed over for the state before it")
    return None


def count(saved: SavedState) -> None:
    """Write the sidecar of a state whose files are there."""
    told = {"format": FORMAT, "training": _training(saved.sidecar.parent), "step": saved.step}
    write_json(saved.sidecar, {**told, "files": saved.files, "values": saved.values})


def parsed(content: bytes, folder: Path, step: int) -> SavedState:
    """What a sidecar tells of a state in `folder`. Raises ValueError where it is torn, or another training's."""
    name = folder / f"{stem(step)}.json"
    try:
        told = json.loads(content)
        training, files, values = told["training"], dict(told["files"]), dict(told["values"])
        known = told["format"] == FORMAT and told["step"] == step and files
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{name} is torn, or no state's") from None
    if not known or not all(re.fullmatch(rf"{stem(step)}(/[\w-]+)?\.safetensors", file) for file in files):
        raise ValueError(f"{name} is of another format than {FORMAT}, or of another step")
    if training != _training(folder):
        raise ValueError(f"{name} is of another training ({training})")
    first = folder / next(iter(files))
    return SavedState(step, values, first if first.parent == folder else first.parent, files)


def checked(saved: SavedState) -> SavedState:
    """The state, every byte of which was compared. Raises ValueError where it is torn."""
    for name, digest in saved.files.items():
        file = saved.path.parent / name
        try:
            torn = "its content is not what was written" if file_sha256(file) != digest else ""
        except OSError as error:
            torn = error.strerror or str(error)
        if torn:
            raise ValueError(f"{file} is torn ({torn})")
    return saved


def forget(folder: Path, step: int) -> None:
    """Let go of a state: it does not count any more before anything of it is gone."""
    (folder / f"{stem(step)}.json").unlink(missing_ok=True)
    (folder / f"{stem(step)}.safetensors").unlink(missing_ok=True)
    shutil.rmtree(folder / stem(step), ignore_errors=True)


def stem(step: int) -> str:
    """step-00000400: what the names of a state's files begin with."""
    return f"step-{step:08d}"


def steps(folder: Path) -> list[int]:
    """The steps that have a sidecar, in order."""
    names = (re.fullmatch(r"step-(\d{8,})", file.stem) for file in folder.glob("step-*.json"))
    return sorted(int(name[1]) for name in names if name)


def _training(folder: Path) -> str:
    """The training that a folder is of: abc, also where it was set aside as abc.1."""
    return folder.name.partition(".")[0]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except (FileNotFoundError, SafetensorError) as error:
        raise ValueError(f"{path} is missing or torn ({error})") from None


def _told(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{tuple(shape)} {str(dtype).removeprefix('torch.')}"
