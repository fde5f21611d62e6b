"""A folder in which the stage `train` can be run by its command: real, tiny latents and settings of a small network."""

import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dit import entry
from dit.checkpoint import save_tensors
from dit.paths import file_sha256, write_json
from dit.stages.train import train

FORK = multiprocessing.get_context("fork")  # a child that has torch already
NOWHERE = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}


def write_project(root: Path, run: dict[str, Any], **changes: Any) -> Path:
    """artifacts/encode (24 images of 3 classes) and params.yaml; `changes` are of the section train."""
    folder = root / "artifacts" / "encode"
    folder.mkdir(parents=True)
    draws = torch.Generator().manual_seed(0)
    shards = []
    for split in ("train", "heldout"):
        mean, label = torch.randn(24, 2, 4, 4, generator=draws), torch.arange(24) % 3
        file = folder / f"{split}.safetensors"
        save_tensors(file, {"mean": mean.half(), "std": torch.full_like(mean, 0.1).half(), "label": label})
        shards.append({"file": file.name, "split": split, "samples": 24, "sha256": file_sha256(file)})
    index = {"digest": "d" * 64, "autoencoder": "a" * 64, "channels": 2, "size": 4, "image_size": 16, "mirror": False}
    index |= {"classes": ["x", "y", "z"], "data": {"name": "tiny", "digest": "t" * 64}, "shards": shards}
    index |= {"normalization": {"mode": "scale", "mean": [0.0, 0.0], "std": [1.0, 1.0]}}
    write_json(folder / "index.json", index)
    model = {"name": "custom", "patch_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 2, "learn_sigma": False}
    settings = {"max_steps": 10, "global_batch_size": 8, "lr": 0.01, "ema_decay": 0.9, "power_ema": [0.1], **changes}
    sections = {"model": model, "objective": {"name": "transport"}, "train": settings, "run": {"device": "cpu", **run}}
    write_json(root / "params.yaml", sections)  # JSON is YAML
    return root


def another(project: Path, root: Path) -> Path:
    """The same latents and settings elsewhere, and nothing trained yet."""
    shutil.copytree(project / "artifacts" / "encode", root / "artifacts" / "encode")
    shutil.copy(project / "params.yaml", root)
    return root


def written(project: Path) -> dict[str, bytes]:
    """What a training has written, by name, but for what tells of the process."""
    folder = project / "artifacts" / "train"
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in files.items() if name != "run.json"}


def counted(project: Path) -> list[int]:
    """The steps of the states that count."""
    return sorted(int(file.stem.removeprefix("step-")) for file in project.glob("scratch/train/*/step-*.json"))


def begin(project: Path, before: Callable[[], None] = lambda: None) -> Any:
    """`python -m dit.stages.train` in a process that has loaded it already; what it says is appended to the file `said`."""

    def work() -> None:
        os.chdir(project)
        sys.stdout = sys.stderr = open("said", "a")  # noqa: SIM115 (it ends with the process)
        before()
        entry.main(train, together=True)

    child = FORK.Process(target=work, daemon=True)
    child.start()
    return child


def ended(project: Path) -> str:
    """Run the command to its end, which must be a good one; what it said."""
    (project / "said").unlink(missing_ok=True)
    child = begin(project)
    child.join(120)
    said = (project / "said").read_text()
    assert child.exitcode == 0, said
    return said


@contextmanager
def killed(project: Path, before: Callable[[], None] = lambda: None) -> Any:
    """The command, which gets SIGKILL when the block ends."""
    child = begin(project, before)
    try:
        yield child
        assert child.exitcode is None, f"it ended before it could be killed: {(project / 'said').read_text()}"
    finally:
        child.kill()
        child.join()
