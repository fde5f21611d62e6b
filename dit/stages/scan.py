"""scan: what does the source hold now, and what is new since the last look?

Runs every time, so it must be cheap: hashes of unchanged files are remembered. Its own last listing is its history,
from which an image has its generation and number for ever; nothing downstream runs unless the listing changed.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path

from dit import entry, reuse
from dit.paths import Paths, write_atomic
from dit.progress import Progress
from dit.sources import (
    DataConfig,
    Entry,
    Found,
    Listing,
    Row,
    content_hash,
    format_listing,
    list_images,
    read_content,
    read_listing,
)

UNSETTLED_NS = 2_000_000_000  # a file younger than this may be written again within the same time stamp
Hashed = tuple[str, str]  # key, sha256
READERS = 8  # files are read in parallel for the sake of slow disks; a local one gains nothing by more


def scan(data: DataConfig, *, paths: Paths) -> None:
    """List the source in artifacts/scan/listing.json, which stays as it is where nothing changed."""
    file = paths.artifacts / "scan" / "listing.json"
    before = last_listing(paths, file)
    found = list_images(data)
    hashes = _content_hashes(data, found.images, paths.scratch / "scan")
    listing = succeed(before, data, found, hashes)
    content = format_listing(listing)
    if before is None or file.read_bytes() != content:
        write_atomic(file, content)
    print(summary(before, listing, found.others))


def last_listing(paths: Paths, file: Path) -> Listing | None:
    """What scan wrote last, which is the history of the images: without it every shard would be cut anew.

    Where the file is gone or damaged it is taken out of DVC's cache. None where there is no history at all. Raises
    ValueError where it is damaged and cannot be had back.
    """
    try:
        return read_listing(file)
    except (FileNotFoundError, ValueError) as error:
        if reuse.recover(paths, "scan", file):
            print("the last listing was missing or damaged: it came back from DVC's cache")
            return read_listing(file)
        if isinstance(error, FileNotFoundError):
            return None
        raise


def succeed(before: Listing | None, data: DataConfig, found: Found, hashes: dict[str, str]) -> Listing:
    """The listing of what was found, as the successor of the one before.

    A known key keeps its generation and number, whatever its content; new ones form the next generation, numbered in
    the order of their keys; labels are looked up by class name now. Another source, or other labels, start anew.
    """
    if before and (before.source, before.labels) != (data.source, data.labels):
        before = None
    known = {row.key: (row.generation, row.number) for row in before.rows} if before else {}
    generation = 1 + max((generation for generation, _ in known.values()), default=-1)
    numbers = count()
    rows = []
    for image in found.images:
        if image.key in hashes:
            seen = known.get(image.key) or (generation, next(numbers))
            rows.append(Row(image.key, image.bytes, hashes[image.key], image.label, *seen))
    return Listing(data.source, data.labels, found.classes, rows)


def summary(before: Listing | None, listing: Listing, others: int = 0) -> str:
    """One line for a person: how many images, and what changed."""
    restarted = before is not None and (before.source, before.labels) != (listing.source, listing.labels)
    old = {row.key: row.sha256 for row in before.rows} if before and not restarted else {}
    now = {row.key: row.sha256 for row in listing.rows}
    changed = sum(1 for key, sha256 in now.items() if old.get(key, sha256) != sha256)
    classes = f" in {len(listing.classes)} classes" if listing.classes else ""
    line = f"{len(now)} images{classes} of {listing.source!r}: "
    line += f"{len(now.keys() - old.keys())} new, {changed} changed, {len(old.keys() - now.keys())} gone"
    if unreadable := Counter(now.values())[""]:
        line += f"; {unreadable} could not be read"
    if others:
        line += f"; {others} other files ignored"
    if restarted:
        line += "; another source or kind of labels than before: the history starts anew"
    elif before and before.classes != listing.classes:
        line += "; the classes changed: labels count through their names as they are now"
    return line


def _content_hashes(data: DataConfig, images: list[Entry], scratch: Path) -> dict[str, str]:
    """key -> sha256, "" where a file can't be read, no entry where it vanished meanwhile.

    Hashes of files with an unchanged (path, size, mtime, inode) come from the memory that the last scan left.
    """
    source = str(Path(data.source).expanduser().resolve())
    file = scratch / f"{hashlib.sha256(source.encode()).hexdigest()[:16]}.json"
    try:
        memory = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        memory = {}
    started = time.time_ns()
    known = {image.key: memory[image.key][3] for image in images if _unchanged(image, memory.get(image.key))}
    unknown = [image for image in images if image.key not in known]
    hashes = known | dict(_hash_all(data, unknown))
    settled = {
        image.key: [*image.stamp, hashes[image.key]]
        for image in images
        if image.stamp and hashes.get(image.key) and abs(started - image.stamp[1]) > UNSETTLED_NS
    }
    if settled != memory:
        write_atomic(file, json.dumps(settled, separators=(",", ":")).encode())
    return hashes


def _unchanged(image: Entry, remembered: list | None) -> bool:
    return remembered is not None and image.stamp is not None and list(image.stamp) == remembered[:3]


def _hash_all(data: DataConfig, images: list[Entry]) -> Iterator[Hashed]:
    progress = Progress("scan", len(images), say=print if len(images) >= 10_000 else lambda line: None)
    with ThreadPoolExecutor(READERS) as pool:
        for first in range(0, len(images), 512):  # all at once would keep an interrupt waiting
            part = images[first : first + 512]
            yield from filter(None, pool.map(partial(_hash, data), part))
            progress(len(part))


def _hash(data: DataConfig, image: Entry) -> Hashed | None:
    try:
        return image.key, content_hash(read_content(data, image.key))
    except FileNotFoundError:
        return None
    except OSError:
        return image.key, ""


if __name__ == "__main__":
    entry.main(scan)
