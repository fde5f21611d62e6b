"""The real images as WebDataset shards: which image goes where, how a shard is written, how it is read again.

Everything is a pure function of listing and settings, and local: an image belongs to the block of `shard_images`
consecutive numbers of its generation, and whether it is held out depends on its block alone. So adding images makes
new blocks, removing or replacing one rewrites its own block's shards, and a cold run ends in the same bytes.
"""

import hashlib
import io
import json
import os
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dit.sources import DataConfig, Listing, Row, Source, Unreadable, content_hash, decode

FORMAT = "dit-shard/1"  # change it with anything here that changes a shard's bytes
Split = Literal["train", "heldout"]
GOLDEN_RATIO = (5**0.5 - 1) / 2  # its multiples, modulo 1, fill the interval as evenly as any sequence can
SPLITS: tuple[Split, ...] = ("train", "heldout")


class Block(NamedTuple):
    """The images of one shard."""

    split: Split
    generation: int
    position: int  # number // shard_images
    rows: list[Row]  # by number

    @property
    def file(self) -> str:
        return f"{self.split}/g{self.generation:04d}-{self.position:05d}.tar"


def plan(listing: Listing, data: DataConfig) -> list[Block]:
    """All shards of a listing, train first, by generation and position."""
    held = held_out(listing, data)
    blocks: dict[tuple[Split, int, int], list[Row]] = defaultdict(list)
    for row in listing.rows:
        split: Split = "heldout" if row.key in held else "train"
        blocks[split, row.generation, row.number // data.shard_images].append(row)
    order = sorted(blocks, key=lambda block: (SPLITS.index(block[0]), *block[1:]))
    return [Block(*block, sorted(blocks[block], key=lambda row: row.number)) for block in order]


def held_out(listing: Listing, data: DataConfig) -> set[str]:
    """The keys of the held-out images: `held_out_fraction` of each class in each block, by keyed content hash.

    A stratum of n images gives floor(fraction * n + u), u in [0, 1): drawn by hash for a class and generation and
    spread evenly over its blocks, so that small strata have their share on average and large sums are close. Equal
    contents are taken together or not at all, and a content that occurred in an earlier stratum goes where it went
    there: no copy of a training image is ever held out.
    """
    strata: dict[tuple[int, int, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in listing.rows:
        if row.sha256:  # else unreadable: in no shard
            name = listing.classes[row.label] if listing.classes else ""
            strata[row.generation, row.number // data.shard_images, name][row.sha256].append(row.key)
    held: set[str] = set()
    decided: dict[str, bool] = {}
    for stratum in sorted(strata):  # by class name and not by label: a class added in between moves nobody
        fresh = {sha256: keys for sha256, keys in strata[stratum].items() if sha256 not in decided}
        generation, position, name = stratum
        u = (_uniform(data.split_seed, generation, name) + position * GOLDEN_RATIO) % 1
        quota = int(data.held_out_fraction * sum(map(len, fresh.values())) + u)
        for sha256 in sorted(fresh, key=lambda sha256: _keyed(data.split_seed, sha256)):
            decided[sha256] = len(fresh[sha256]) <= quota
            quota -= len(fresh[sha256]) if decided[sha256] else 0
        held.update(key for sha256, keys in strata[stratum].items() if decided[sha256] for key in keys)
    return held


def _keyed(*parts: Any) -> bytes:
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def _uniform(*parts: Any) -> float:
    return int.from_bytes(_keyed(*parts)[:6]) / 2**48


def input_digest(block: Block, data: DataConfig) -> str:
    """The name of everything that a shard's bytes depend on, Pillow's version included: it scales and compresses."""
    import PIL
    from PIL import features

    rows = [(row.key, row.sha256, row.label, row.generation, row.number) for row in block.rows]
    made_by = [FORMAT, PIL.__version__, features.version("zlib"), features.version("jpg"), features.version("webp")]
    return _keyed(made_by, data.source == "digits", data.image_size, rows).hex()


def write_shard(
    path: Path, block: Block, data: DataConfig, source: Source, observe: Callable[[int], None] = lambda count: None
) -> list[dict[str, str]]:
    """Write a block's images to a WebDataset tar; return those that are no pictures, as [{"key", "reason"}].

    A sample is {__key__, png, cls, json}: the key `<generation>-<number>` is safe whatever the file's name, which
    stands in json. Where nothing is readable, no file is written. Raises ValueError if an image is not what scan saw.
    """
    quarantine = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        open(path, "wb") as file,
        tarfile.open(fileobj=file, mode="w") as tar,
    ):
        for first in range(0, len(block.rows), 64):  # bounded: results wait in memory for their turn
            rows = block.rows[first : first + 64]
            for row, png in zip(rows, pool.map(partial(_as_png, data, source), rows), strict=True):
                if isinstance(png, bytes):
                    origin = json.dumps({"key": row.key}).encode()
                    _add(tar, row, cls=str(row.label).encode(), json=origin, png=png)
                else:
                    quarantine.append({"key": row.key, "reason": png})
            observe(len(rows))
    if len(quarantine) == len(block.rows):
        path.unlink()
    return quarantine


def _add(tar: tarfile.TarFile, row: Row, **contents: bytes) -> None:
    """Add one sample. tarfile, and not webdataset's writer: that imports torch, which this stage has no other use for."""
    for extension, content in contents.items():
        member = tarfile.TarInfo(f"{row.generation:04d}-{row.number:08d}.{extension}")
        member.size, member.mode, member.uname, member.gname = len(content), 0o444, "dit", "dit"
        tar.addfile(member, io.BytesIO(content))
    tar.members = []  # tarfile remembers every member it has written


def count_classes(block: Block, quarantine: list[dict[str, str]], data: DataConfig) -> list[int]:
    """How many of a block's images are readable, by label ([n] where there are no labels)."""
    bad = {image["key"] for image in quarantine}
    counts = [0] * max(data.num_classes, 1)
    for row in block.rows:
        counts[row.label] += row.key not in bad
    return counts


def _as_png(data: DataConfig, source: Source, row: Row) -> bytes | str:
    """The image as PNG, or the reason why there is none."""
    if not row.sha256:
        return "the file could not be read when the source was scanned"
    try:
        content = source.read(row.key)
        if content_hash(content) != row.sha256:
            content = source.read(row.key)  # what came over a wire may have been damaged on the way
    except OSError as error:
        raise ValueError(f"data.source: {row.key!r} changed since scan ({error.strerror}): run again") from None
    if content_hash(content) != row.sha256:
        raise ValueError(f"data.source: {row.key!r} changed since scan: run again")
    try:
        image = decode(data, content)
    except Unreadable as error:
        return str(error)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def build_manifest(listing: Listing, data: DataConfig, shards: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest of finished shards, with a digest over all of it. Raises ValueError with nothing to train on."""
    counts = np.sum([shard["class_counts"] for shard in shards if shard["split"] == "train"], axis=0, dtype=np.int64)
    if not np.any(counts):
        raise ValueError("data.held_out_fraction: no image is left to train on: lower it, or add images")
    if missing := [name for name, count in zip(listing.classes, np.atleast_1d(counts), strict=False) if not count]:
        raise ValueError(
            f"data.source: {len(missing)} classes ({missing[0]!r}{', ...' * bool(missing[1:])}) have no readable image "
            "left to train on: add some, or lower held_out_fraction"
        )
    manifest = {"classes": listing.classes, "image_size": data.image_size, "shards": shards}
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return {"classes": listing.classes, "image_size": data.image_size, "digest": digest, "shards": shards}


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a shard stage's folder. Raises ValueError where there is none."""
    try:
        return json.loads((folder / "manifest.json").read_bytes())
    except (FileNotFoundError, ValueError):
        raise ValueError(
            f"{folder} holds no shards (manifest.json is missing or torn): run the stage `shard`"
        ) from None


def read_shard(path: Path, keep: Callable[[int], bool] = lambda number: True) -> Iterator[tuple[str, int, np.ndarray]]:
    """(key `<generation>-<number>`, label, image uint8 (H, W, 3)) of each sample, one at a time.

    Only samples whose position in the shard `keep` takes are decoded.
    """
    from PIL import Image

    try:
        for position, (key, sample) in enumerate(_samples(path)):
            if keep(position):
                with Image.open(io.BytesIO(sample["png"]), formats=("PNG",)) as image:
                    yield key, int(sample["cls"]), np.asarray(image)
    except (KeyError, OSError, EOFError, tarfile.TarError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}): run the stage `shard`") from None


def read_keys(path: Path) -> list[str]:
    """The keys, as the source has them, of a shard's images in their order; no image is read."""
    try:
        with tarfile.open(path, "r:") as tar:
            names = [member for member in tar if member.name.endswith(".json")]
            return [json.loads(tar.extractfile(member).read())["key"] for member in names]
    except (KeyError, OSError, EOFError, tarfile.TarError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}): run the stage `shard`") from None


def _samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    # tarfile, and not webdataset: see `_add`, and its readers are made to shuffle, split and resample.
    key, sample = "", {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            name, _, extension = member.name.partition(".")
            if name != key and sample:
                yield key, sample
                sample = {}
            key, sample[extension] = name, tar.extractfile(member).read()
            tar.members = []  # tarfile remembers every member it has passed
    if sample:
        yield key, sample


def stream_split(folder: Path, split: Split, most: int | None = None) -> Iterator[tuple[str, int, np.ndarray]]:
    """`read_shard` over all shards of a split, in the manifest's order. `folder` is artifacts/shard.

    At most `most` images where that is given, taken evenly from all of them: shards are sorted by class.
    """
    shards = [shard for shard in read_manifest(folder)["shards"] if shard["split"] == split]
    total = sum(shard["samples"] for shard in shards)
    step = _step(total, most)
    passed = 0
    for shard in shards:
        yield from read_shard(folder / shard["file"], lambda position, passed=passed: (passed + position) % step == 0)
        passed += shard["samples"]


def load_split(folder: Path, split: Split, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A split (or `most` of it, taken evenly) in memory: images uint8 (N, H, W, 3), labels int64 (N,)."""
    manifest = read_manifest(folder)
    total = sum(shard["samples"] for shard in manifest["shards"] if shard["split"] == split)
    count, side = -(-total // _step(total, most)), manifest["image_size"]
    images, labels = np.empty((count, side, side, 3), np.uint8), np.empty(count, np.int64)
    for index, (_, label, image) in enumerate(stream_split(folder, split, most)):
        images[index], labels[index] = image, label
    return images, labels


def _step(total: int, most: int | None) -> int:
    return 1 if most is None else max(1, -(-total // most))
