"""How fast batches of latents are gathered on one core: from memory, from mapped files, streamed, and fed to a device.

    python benchmarks/load.py                            # 256 latents of 8x32x32 float16 moments, 16 KiB each, a batch
    python benchmarks/load.py --images 65536 --batch 1024
    python benchmarks/load.py --device cuda              # the feed's copies to the GPU, too
    python benchmarks/load.py --json > result.json

The ways take turns, and among them a plain copy of as many latents as a batch has, as they lie, which tells what the
machine had to give at that time. `cold` files were dropped from the page cache before; `streamed` ones come from a folder in windows
of four shards, each checked by its sha256. Rates are latents per second of the wall clock and, where others use the
machine too, per second that this process was given a core. Conversion and sampling are no part of it.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from telling import tell

from dit import runtime
from dit.checkpoint import save_tensors
from dit.dataset import LatentDataset
from dit.feeding import Feed
from dit.paths import file_sha256, write_json
from dit.places import Folder

SHARD_IMAGES, CHANNELS, SIDE = 1024, 4, 32  # mean and std have four channels each
BARS = {"memory": 200_000, "mapped": 20_000}  # latents a second


@dataclass(frozen=True)
class Row:
    """Latents per second of each repeat: of the wall clock, and of the time that this process had a core."""

    way: str
    wall: list[float]
    core: list[float]


def write_latents(folder: Path, images: int, seed: int = 0) -> None:
    """As the stage `encode` leaves them: random moments in shards, and index.json."""
    shards = []
    for number, start in enumerate(range(0, images, SHARD_IMAGES)):
        size, generator = min(SHARD_IMAGES, images - start), torch.Generator().manual_seed(seed + number)
        moments = torch.randn(2, size, CHANNELS, SIDE, SIDE, generator=generator).half()
        file = folder / f"{number:05d}.safetensors"
        save_tensors(file, {"mean": moments[0], "std": moments[1].abs(), "label": torch.arange(size) % 1000})
        shards.append({"file": file.name, "split": "train", "samples": size, "sha256": file_sha256(file)})
    normalization = {"mean": [0.0] * CHANNELS, "std": [1.0] * CHANNELS}
    write_json(folder / "index.json", {"shards": shards, "normalization": normalization, "classes": ["a"] * 1000})


def chill(folder: Path) -> None:
    """Drop the files from the page cache, where the system can."""
    for file in folder.glob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def ways(
    folder: Path, scratch: Path, batch: int, batches: int, device: torch.device
) -> dict[str, Callable[[int], int]]:
    """What is timed, by name; each is told the repeat, gathers and answers how many latents it did."""
    memory, mapped = (LatentDataset(folder, 0, batch, where=where) for where in ("memory", "mapped"))
    mapped.batch(0)
    window, source = 4 * SHARD_IMAGES, Folder(str(folder))
    spans = lambda repeat: range(repeat * batches, (repeat + 1) * batches)  # noqa: E731
    mean, std = memory.tensors["mean"], memory.tensors["std"]
    target = torch.empty(2, batch, *mean.shape[1:], dtype=mean.dtype)

    def copied(repeat: int) -> int:
        for step in spans(repeat):  # one after the other, as they lie
            start = step * batch % (len(mean) - batch + 1)
            target[0].copy_(mean[start : start + batch]), target[1].copy_(std[start : start + batch])
        return batches * batch

    def gathered(data: LatentDataset) -> Callable[[int], int]:
        return lambda repeat: sum(len(data.batch(step)["label"]) for step in spans(repeat))

    def cold(repeat: int) -> int:
        mapped.shards._open.clear()  # what is mapped is not dropped
        chill(folder)
        return gathered(mapped)(repeat)

    def streamed(repeat: int) -> int:
        place = {"where": "streamed", "source": source, "cache": scratch / str(repeat), "window": window}
        data = LatentDataset(folder, 0, batch, **place)
        done = gathered(data)(0)
        data.close()
        return done

    def fed(data: LatentDataset) -> Callable[[int], int]:
        def walk(repeat: int) -> int:
            with Feed(data, spans(repeat), device=device) as feed:
                done = sum(len(batch["label"]) for batch in feed)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return done

        return walk

    found = {"a plain copy": copied, "memory": gathered(memory), "mapped": gathered(mapped)}
    found |= {"memory, fed": fed(memory), "mapped, fed": fed(mapped), "streamed": streamed}
    return found | ({"mapped, cold": cold} if hasattr(os, "posix_fadvise") else {})


def measure(images: int, batch: int, batches: int, repeats: int, device: torch.device) -> list[Row]:
    """Each way `repeats` times, in turns."""
    with tempfile.TemporaryDirectory() as there:
        folder, scratch = Path(there) / "encode", Path(there) / "cache"
        folder.mkdir()
        write_latents(folder, images)
        found = ways(folder, scratch, batch, batches, device)
        rows = {way: Row(way, [], []) for way in found}
        for repeat in range(-1, repeats):  # the first warms up
            for way, work in found.items():
                core, wall = time.process_time(), time.perf_counter()
                done = work(repeat + 1)
                wall, core = time.perf_counter() - wall, time.process_time() - core
                if repeat >= 0:
                    rows[way].wall.append(done / wall)
                    rows[way].core.append(done / core)
        return list(rows.values())


def table(rows: list[Row]) -> str:
    """Medians (least to most), and whether what is asked for is reached by the median of a core's time."""
    lines = ["| from | latents/s, wall clock | latents/s, of a core | asked for | |", "|---|---|---|---|---|"]
    for row in rows:
        bar = BARS.get(row.way)
        reached = "" if bar is None else "reached" if statistics.median(row.core) >= bar else "missed"
        told = [row.way, _spread(row.wall), _spread(row.core), f"{bar:,}" if bar else "", reached]
        lines.append("| " + " | ".join(told) + " |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16_384, help="written to a temporary folder, 16 KiB each")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batches", type=int, default=32, help="in each repeat (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="that the feed feeds")
    parser.add_argument("--json", action="store_true", help="print every measurement instead of the table")
    given = parser.parse_args()
    torch.set_num_threads(1)
    device = runtime.pick_device(given.device)
    rows = measure(given.images, given.batch, given.batches, given.repeats, device)
    tell(rows, table(rows), as_json=given.json, images=given.images, batch=given.batch, feeds=device.type)


if __name__ == "__main__":
    main()
