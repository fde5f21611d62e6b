"""How fast shards of images become shards of latents, beside the same work done one thing after the other.

    python benchmarks/encode.py                       # the digits at 32 pixels, pictures at 256
    python benchmarks/encode.py --case pictures --side 512 --images 16
    python benchmarks/encode.py --case pictures --device cuda --width 128 --images 2048
    python benchmarks/encode.py --json > result.json

`digits` are the embedded digits and an autoencoder as presets/digits.yaml fits it; `pictures` are drawn here, smooth
with some noise, and go through an autoencoder of sd-vae's shape, `--width` (of 128) channels wide. Weights are random.
One by one: a shard is read, decoded, encoded, written, hashed and read again for its statistics, as the stage did
before it overlapped them. That both write the same bytes is checked first; then they take turns, each in a process of
its own, since how the C library keeps memory belongs to a process. `reading` and `autoencoder` are each alone: no
overlap is faster than the slower of the two. Processor seconds are those of all threads; on a busy machine they tell
more than the clock.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from telling import tell
from torch import Tensor

from dit import encoding, heap, reuse, runtime
from dit.checkpoint import load_tensors, save_tensors
from dit.encoding import Task, encode_shards, measure
from dit.latents import Statistics
from dit.paths import Paths, file_sha256
from dit.shards import read_manifest, read_shard
from dit.sources import DataConfig
from dit.stages.scan import scan
from dit.stages.shard import shard
from dit.vae import Autoencoder, VaeConfig, batch_of, import_diffusers

SEED = 0


@dataclass(frozen=True)
class Row:
    """What was measured of a case: seconds of the clock, and of the processor, of each run over all images."""

    case: str
    side: int
    images: int
    clock: dict[str, list[float]]
    processor: dict[str, list[float]]


@dataclass(frozen=True)
class Work:
    """Shards and the autoencoder they go through."""

    side: int
    tasks: list[Task]
    autoencoder: Autoencoder
    paths: Paths

    @classmethod
    def of(cls, root: Path, device: torch.device) -> "Work":
        """What `digits` or `pictures` made."""
        paths = Paths(root)
        manifest = read_manifest(paths.artifacts / "shard")
        tasks = [
            Task(paths.artifacts / "shard" / entry["file"], entry["samples"], root / f"{number}.latents", str(number))
            for number, entry in enumerate(manifest["shards"])
        ]
        return cls(manifest["image_size"], tasks, Autoencoder.load(paths.artifacts / "vae", device), paths)


def digits(root: Path) -> None:
    """1,797 digits of 32 pixels, in eight shards."""
    data = DataConfig("digits", "digits", "folder", 10, 32, False, 0.2, 0, 512, 0.01)
    _make(root, data, _network(VaeConfig(None).block_out_channels, 1, 8, False))


def pictures(root: Path, side: int, images: int, width: int) -> None:
    """Drawn pictures of `side` pixels, and an autoencoder of sd-vae's shape: four sizes, the last as the third."""
    from PIL import Image

    rng = np.random.default_rng(SEED)
    (root / "pictures").mkdir(parents=True)
    for number in range(images):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse) + rng.normal(0, 4, (side, side, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(root / "pictures" / f"{number:05d}.png")
    data = DataConfig("pictures", str(root / "pictures"), "none", 0, side, False, 0.0, 0, max(8, images // 4), 0.01)
    network = _network(tuple(width * times for times in (1, 2, 4, 4)), 2, min(32, width), True)
    _make(root, data, network)


def _network(channels: tuple[int, ...], layers: int, groups: int, attention: bool) -> Any:
    torch.manual_seed(SEED)
    return import_diffusers()(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=layers,
        latent_channels=4,
        norm_num_groups=groups,
        mid_block_add_attention=attention,
    )


def _make(root: Path, data: DataConfig, network: Any) -> None:
    scan(data, paths=Paths(root))
    shard(data, paths=Paths(root))
    network.save_pretrained(Paths(root).artifacts / "vae")


def overlapped(work: Work) -> None:
    """As the stage does it."""
    with reuse.opened(work.paths, "overlapped") as index:

        def finish(task: Task, tensors: dict[str, Tensor]) -> None:
            save_tensors(task.path, tensors)
            reuse.remember(index, task.digest, task.path, measure(tensors, work.autoencoder.channels))

        encode_shards(work.tasks, work.side, work.autoencoder, finish)


def one_by_one(work: Work) -> None:
    """As the stage did it before: in one thread, each step when the one before it is done."""
    total = Statistics(work.autoencoder.channels)
    with reuse.opened(work.paths, "one by one") as index:
        for task in work.tasks:
            parts: dict[str, list[Tensor]] = {"mean": [], "std": [], "label": []}
            samples = read_shard(task.source)
            while some := [sample for _, sample in zip(range(batch_of(work.side)), samples, strict=False)]:
                _, labels, images = zip(*some, strict=True)
                mean, std = work.autoencoder.moments(np.stack(images))
                for key, value in {"mean": mean.half(), "std": std.half(), "label": torch.tensor(labels)}.items():
                    parts[key].append(value)
            save_tensors(task.path, {key: torch.cat(value) for key, value in parts.items()})
            reuse.remember(index, task.digest, task.path)
            tensors = load_tensors(task.path)
            total.add(tensors["mean"].float(), tensors["std"].float())


def reading(work: Work) -> None:
    """Reading and decoding alone, as the overlapped way does it."""
    with encoding.decoded(work.tasks, work.side, work.autoencoder.network.device) as batches:
        for _ in batches:
            pass


def autoencoder(work: Work, batches: list[encoding.Batch]) -> None:
    """The autoencoder alone, on batches that are decoded already."""
    for _ in encoding.encoded(iter(batches), work.autoencoder, False, None):
        pass


WAYS = ("one by one", "overlapped", "reading", "autoencoder")


def serve(root: Path, device: torch.device) -> None:
    """Do what stdin asks for, a way a line, and tell the seconds and what the shards then hold."""
    work = Work.of(root, device)
    with encoding.decoded(work.tasks, work.side, device) as batches:
        decoded = list(batches)
    ways = {"one by one": one_by_one, "overlapped": overlapped, "reading": reading}
    ways["autoencoder"] = lambda work: autoencoder(work, decoded)
    for line in sys.stdin:
        started, spent = time.perf_counter(), time.process_time()
        ways[line.strip()](work)
        told = {"clock": time.perf_counter() - started, "processor": time.process_time() - spent}
        print(json.dumps(told | {"files": [file_sha256(task.path) for task in work.tasks]}), flush=True)


def compare(name: str, root: Path, repeats: int, words: list[str]) -> Row:
    """Alternate runs, after one of each. Raises RuntimeError where the two ways do not write the same bytes."""
    work = read_manifest(Paths(root).artifacts / "shard")
    command = [sys.executable, __file__, "--serve", str(root), *words]
    processes = [
        subprocess.Popen([*command, *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for more in ([], ["--keep"])
    ]

    def ask(way: str) -> dict[str, Any]:
        process = processes[way != "one by one"]
        print(way, file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    try:
        first = {way: ask(way)["files"] for way in WAYS}
        if first["one by one"] != first["overlapped"]:
            raise RuntimeError(f"{name}: the two ways do not write the same bytes")
        runs = [{way: ask(way) for way in WAYS} for _ in range(repeats)]
    finally:
        for process in processes:
            process.communicate()
    clock, processor = ({way: [run[way][kind] for run in runs] for way in WAYS} for kind in ("clock", "processor"))
    return Row(name, work["image_size"], sum(entry["samples"] for entry in work["shards"]), clock, processor)


def table(rows: list[Row]) -> str:
    """Images a second, median (least to most); the median of how many times faster, run by run; processor time."""
    lines = [
        "| case | pixels | images | one by one, images/s | overlapped | faster | reading alone | autoencoder alone "
        "| processor, ms an image: one by one | overlapped |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rates = {way: [row.images / seconds for seconds in some] for way, some in row.clock.items()}
        spent = {way: [1e3 * seconds / row.images for seconds in some] for way, some in row.processor.items()}
        faster = [a / b for a, b in zip(row.clock["one by one"], row.clock["overlapped"], strict=True)]
        told = [row.case, str(row.side), str(row.images), _spread(rates["one by one"]), _spread(rates["overlapped"])]
        told += [f"{_spread(faster, '.2f')}x", _spread(rates["reading"]), _spread(rates["autoencoder"])]
        told += [_spread(spent[way], ".2f") for way in ("one by one", "overlapped")]
        lines.append("| " + " | ".join(told) + " |")
    return "\n".join(lines)


def _spread(values: list[float], form: str = ".0f") -> str:
    if statistics.median(values) < 10 and form == ".0f":
        form = ".2f"
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=("digits", "pictures"), default=["digits", "pictures"])
    parser.add_argument("--side", type=int, default=256, help="pixels of the pictures (default: %(default)s)")
    parser.add_argument("--images", type=int, default=48, help="how many pictures (default: %(default)s)")
    parser.add_argument(
        "--width", type=int, default=16, help="of their autoencoder; sd-vae: 128 (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU, for the autoencoder (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    parser.add_argument("--json", action="store_true", help="print every measurement instead of the table")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)  # a process that does the work in this folder
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    device = runtime.start(runtime.RunConfig(given.device, num_threads=given.threads))
    if given.serve:
        if given.keep:
            heap.keep()
        serve(given.serve, device)
        return
    words, rows = ["--device", given.device, "--threads", str(given.threads)], []
    for name in given.case:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            if name == "digits":
                digits(Path(folder))
            else:
                pictures(Path(folder), given.side, given.images, given.width)
            rows.append(compare(name, Path(folder), given.repeats, words))
    tell(
        rows,
        table(rows),
        as_json=given.json,
        device=device.type,
        threads=given.threads,
        decoders=encoding.decoders(),
        width=given.width,
    )


if __name__ == "__main__":
    main()
