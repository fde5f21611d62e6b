"""shard: the listed images become WebDataset shards, and only the shards of changed blocks are made again."""

from pathlib import Path
from typing import Any

from dit import entry, reuse, storage
from dit.files import open_source
from dit.paths import Paths, publish, write_json
from dit.progress import Progress
from dit.shards import SPLITS, Block, build_manifest, count_classes, input_digest, plan, write_shard
from dit.sources import DataConfig, Source, read_listing


def shard(data: DataConfig, *, paths: Paths) -> None:
    """Write artifacts/shard: train/ and heldout/ tars, manifest.json, quarantine.json."""
    listing = read_listing(paths.artifacts / "scan" / "listing.json")
    if (listing.source, listing.labels, len(listing.classes)) != (data.source, data.labels, data.num_classes):
        raise ValueError(f"data.source: the listing is of {listing.source!r} or other labels: run the scan stage again")
    source = open_source(data, memory=paths.memory / "scan" / "archives", bucket=storage.Bucket, given=paths.given)
    blocks = plan(listing, data)
    with reuse.opened(paths, "shard") as index, publish(paths.artifacts / "shard", paths.scratch) as folder:
        made, built = make_shards(folder, blocks, data, source, index)
        quarantine = [bad for earlier in made.values() for bad in earlier["note"]]
        quarantine.sort(key=lambda bad: bad["key"])
        refuse_many(quarantine, len(listing.rows), data, paths.scratch / "quarantine.json")
        shards = [_manifest_entry(block, made[block.file], data) for block in blocks if "sha256" in made[block.file]]
        manifest = build_manifest(listing, data, shards)
        write_json(folder / "manifest.json", manifest)
        write_json(folder / "quarantine.json", quarantine)
    train, heldout = (sum(shard["samples"] for shard in shards if shard["split"] == split) for split in SPLITS)
    print(
        f"{train} images to train on, {heldout} held out, {len(quarantine)} in quarantine; "
        f"{len(shards)} shards: {built} built, {len(blocks) - built} reused"
    )


def make_shards(
    folder: Path, blocks: list[Block], data: DataConfig, source: Source, index: reuse.Index
) -> tuple[dict[str, dict[str, Any]], int]:
    """Each block's shard under `folder`, fetched or built: (file name -> what reuse says of it, how many were built).

    The note that goes with a shard is its quarantine; a block without a readable image has no file, and only the note.
    """
    for split in {block.split for block in blocks}:
        (folder / split).mkdir(exist_ok=True)
    digests = {input_digest(block, data): block for block in blocks}
    found = reuse.fetch_all(index, {digest: folder / block.file for digest, block in digests.items()})
    missing = {digest: block for digest, block in digests.items() if digest not in found}
    made = {block.file: found.get(digest) for digest, block in digests.items()}
    progress = Progress("shard", sum(len(block.rows) for block in missing.values()))
    for digest, block in missing.items():
        path = folder / block.file
        note = write_shard(path, block, data, source, observe=progress)
        made[block.file] = reuse.remember(index, digest, path, note) if path.exists() else {"note": note}
    return made, len(missing)


def refuse_many(quarantine: list[dict[str, str]], total: int, data: DataConfig, file: Path) -> None:
    """Raise ValueError if more than max_bad_fraction of all images could not be read; then `file` lists them all."""
    file.unlink(missing_ok=True)
    if len(quarantine) > data.max_bad_fraction * total:
        write_json(file, quarantine)
        first = "; ".join(f"{bad['key']!r}: {bad['reason']}" for bad in quarantine[:3])
        raise ValueError(
            f"data.max_bad_fraction: {len(quarantine)} of {total} images can't be read, more than "
            f"{data.max_bad_fraction} of all ({first}{'; ...' * bool(quarantine[3:])}; all of them are in {file}): "
            "repair them, or raise the limit"
        )


def _manifest_entry(block: Block, made: dict[str, Any], data: DataConfig) -> dict[str, Any]:
    counts = count_classes(block, made["note"], data)
    size = {"samples": sum(counts), "bytes": made["bytes"], "sha256": made["sha256"]}
    return {"file": block.file, "split": block.split, **size, "class_counts": counts}


if __name__ == "__main__":
    entry.main(shard)
