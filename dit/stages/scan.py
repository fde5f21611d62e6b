"""scan: what does the source hold now, and what is new since the last look?

Runs every time, so it must be cheap: hashes of unchanged files are remembered, as they come, so that a first look at
millions of them that is interrupted goes on where it stopped. Its own last listing is its history,
from which an image has its generation and number for ever; nothing downstream runs unless the listing changed.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path

from dit import entry, locks, reuse, storage
from dit.files import Files, list_images, open_source
from dit.paths import Paths, write_atomic
from dit.places import READERS, UNSETTLED_NS, Changed, Place
from dit.progress import Progress
from dit.retraining import compare
from dit.sources import (
    DataConfig,
    Entry,
    Found,
    Listing,
    Row,
    Source,
    content_hash,
    format_listing,
    read_listing,
)

Hashed = tuple[Entry, str]  # an image and its sha256
SAVE_SECONDS = 2.0  # at most this much is lost when the process is killed


def scan(data: DataConfig, *, paths: Paths) -> None:
    """List the source in artifacts/scan/listing.json, which stays as it is where nothing changed."""
    file = paths.artifacts / "scan" / "listing.json"
    before = last_listing(paths, file)
    source = open_source(data, memory=paths.memory / "scan" / "archives", bucket=storage.Bucket, given=paths.given)
    found = list_images(data, source)
    hashes = content_hashes(source, found.images, paths.memory / "scan")
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
    changes = compare(before, listing)
    classes = f" in {len(listing.classes)} classes" if listing.classes else ""
    line = f"{len(listing.rows)} images{classes} of {listing.source!r}: "
    line += f"{changes.new.total()} new, {changes.changed.total()} changed, {changes.gone.total()} gone"
    if unreadable := sum(not row.sha256 for row in listing.rows):
        line += f"; {unreadable} could not be read"
    if others:
        line += f"; {others} other files ignored"
    if changes.restarted:
        line += "; another source or kind of labels than before: the history starts anew"
    elif before and before.classes != listing.classes:
        line += "; the classes changed: labels count through their names as they are now"
    return line


def content_hashes(source: Source, images: list[Entry], scratch: Path) -> dict[str, str]:
    """key -> sha256, "" where a file can't be read, no entry where it vanished meanwhile.

    Hashes of files with an unchanged stamp come from the memory that the last scan left in `scratch`, finished or not.
    Another process that looks at the same place is waited for: what it read need not be read again.
    """
    place = source.place if isinstance(source, Files) else None
    name = hashlib.sha256((place.name if place else "").encode()).hexdigest()[:16]
    with locks.held(scratch / f"{name}.lock", _waiting):
        return _content_hashes(source, place, images, scratch / f"{name}.json")


def _waiting(line: str) -> None:
    print(f"scan: {line}: what it reads of the same source counts here too")


def _content_hashes(source: Source, place: Place | None, images: list[Entry], file: Path) -> dict[str, str]:
    memory, journal = _remembered(file), file.with_suffix(".journal")
    started = time.time_ns()
    hashes = {image.key: image.sha256 for image in images if image.sha256 is not None}
    hashes |= {image.key: memory[image.key][3] for image in images if _unchanged(image, memory.get(image.key))}
    unknown = [image for image in images if image.key not in hashes]
    unsettled_ns = place.unsettled_ns if place else UNSETTLED_NS

    def kept(image: Entry, sha256: str | None) -> list | None:
        settled = image.stamp and abs(started - image.stamp[1]) > unsettled_ns
        return [*image.stamp, sha256] if settled and sha256 else None

    changed: set[str] = set()  # while we looked: they are looked at again
    if unknown:
        with open(journal, "a", encoding="utf-8") as lines:
            lines.write("\n")  # what a killed process has left may end in the midst of a line
            saved = time.monotonic()
            for image, sha256 in _hash_all(source, unknown, place.readers if place else READERS):
                hashes[image.key] = sha256
                if image.stamp is None:
                    changed.add(image.key)
                if row := kept(image, sha256):
                    lines.write(json.dumps([image.key, *row]) + "\n")
                if time.monotonic() - saved > SAVE_SECONDS:
                    lines.flush()
                    saved = time.monotonic()
    settled = {
        image.key: row for image in images if image.key not in changed and (row := kept(image, hashes.get(image.key)))
    }
    if settled != memory or journal.exists():
        write_atomic(file, json.dumps(settled, separators=(",", ":")).encode())
        journal.unlink(missing_ok=True)
    return hashes


def _remembered(file: Path) -> dict[str, list]:
    """key -> stamp and sha256: what the last finished scan left, and what unfinished ones added."""
    try:
        memory = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        memory = {}
    try:
        with open(file.with_suffix(".journal"), "rb") as lines:
            for line in lines:
                try:
                    key, *row = json.loads(line)
                    if len(row) == 4:
                        memory[key] = row
                except (ValueError, TypeError):  # torn: the process was killed while it wrote
                    continue
    except FileNotFoundError:
        pass
    return memory


def _unchanged(image: Entry, remembered: list | None) -> bool:
    return remembered is not None and image.stamp is not None and list(image.stamp) == remembered[:3]


def _hash_all(source: Source, images: list[Entry], readers: int) -> Iterator[Hashed]:
    progress = Progress("scan", len(images), say=print if len(images) >= 10_000 else lambda line: None)
    with ThreadPoolExecutor(readers) as pool:
        for first in range(0, len(images), 512):  # all at once would keep an interrupt waiting
            part = images[first : first + 512]
            yield from filter(None, pool.map(partial(_hash, source), part))
            progress(len(part))


def _hash(source: Source, image: Entry) -> Hashed | None:
    version = image.stamp[2] if image.stamp and isinstance(image.stamp[2], str) else ""
    try:
        try:
            return image, content_hash(source.read(image.key, version))
        except Changed:  # since it was listed: what it holds now counts, but the stamp is another's
            return image._replace(stamp=None), content_hash(source.read(image.key))
    except FileNotFoundError:
        return None
    except OSError:
        return image, ""


if __name__ == "__main__":
    entry.main(scan)
