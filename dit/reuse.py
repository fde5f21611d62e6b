"""Results that were made before: found by the digest of what they were made from, taken out of DVC's cache.

DVC knows only whole stages: one new image, and it deletes all shards and has all of them made again. A small index in
scratch/ remembers which file came of which inputs; DVC's cache still holds the file. What a stage made before it was
killed is remembered the same way. A file is used only if its sha256 is right; without cache or index it is just built.
"""

import configparser
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dit import locks
from dit.config import read_params
from dit.paths import Paths, write_atomic

MOST_ENTRIES = 100_000
HASHING = min(8, os.cpu_count() or 1)  # files at a time
LIVING = "lock"  # beside a run's unfinished files: held as long as its process lives


@dataclass(frozen=True)
class Index:
    """What one stage remembers: input digest -> {"md5", "sha256", "bytes", "note"}."""

    cache: Path  # DVC's
    unfinished: Path  # files of this run, which has not ended yet
    entries: dict[str, dict[str, Any]]
    used: dict[str, dict[str, Any]] = field(default_factory=dict)  # those that this run fetched or made, the last last


@contextmanager
def opened(paths: Paths, stage: str) -> Iterator[Index]:
    """The stage's index. Saved when the block ends without error; else the files made so far wait for the next run.

    Several processes, of as many worktrees, may have it open: each keeps its files apart, what it adds does not undo
    what the others add, and nobody takes over the files of one that lives.
    """
    file, folder = paths.memory / "reuse" / f"{stage}.json", paths.memory / "reuse" / stage
    short = paths.memory / "lock" / f"reuse-{stage}"
    with ExitStack() as living:
        with locks.held(short):
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(dir=folder))
            living.enter_context(locks.held(unfinished / LIVING))
            _take_over(folder, unfinished)
            entries = _read(file)
        for note in sorted(unfinished.glob("*.json")):
            entries[note.stem] = _read(note)
        index = Index(cache_folder(paths.root), unfinished, {key: value for key, value in entries.items() if value})
        yield index
        with locks.held(short):
            others = {key: value for key, value in _read(file).items() if key not in index.used}
            newest = dict(list((others | index.used).items())[-MOST_ENTRIES:])
            write_atomic(file, json.dumps(newest, indent=0).encode())
            shutil.rmtree(unfinished, ignore_errors=True)


def _take_over(folder: Path, unfinished: Path) -> None:
    """Move what processes that were killed had made to the folder of this one."""
    for other in folder.iterdir():
        if other == unfinished or not other.is_dir():
            continue
        with locks.tried(other / LIVING) as dead:
            if dead:
                for file in other.iterdir():
                    if file.name != LIVING:
                        os.replace(file, unfinished / file.name)
                shutil.rmtree(other, ignore_errors=True)


def fetch(index: Index, digest: str, destination: Path) -> dict[str, Any] | None:
    """Put the file once made from `digest` at `destination`, by hard link or copy, and return what is remembered of it.

    None, and nothing at `destination`, where there is no such file with the right sha256. The file may be DVC's own:
    never write into it, only replace it.
    """
    entry = index.entries.get(digest)
    if entry is None:
        return None
    for file in (index.cache / entry["md5"][:2] / entry["md5"][2:], index.unfinished / digest):
        if file.is_file() and _hash(file, hashlib.sha256()) == [entry["sha256"]]:
            _link(file, destination)
            _use(index, digest, entry)
            return entry
    return None


def fetch_all(index: Index, wanted: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """`fetch` of each digest to its destination, several at a time: what is remembered, by digest, of those there are."""
    pool = ThreadPoolExecutor(HASHING)
    try:
        found = pool.map(lambda digest: fetch(index, digest, wanted[digest]), wanted)
        return {digest: entry for digest, entry in zip(wanted, found, strict=True) if entry}
    finally:
        pool.shutdown(cancel_futures=True)


def remember(index: Index, digest: str, file: Path, note: Any = None) -> dict[str, Any]:
    """Remember that `file` was made from `digest`, with a note (any JSON) that `fetch` gives back beside it."""
    md5, sha256 = _hash(file, hashlib.md5(usedforsecurity=False), hashlib.sha256())
    entry = {"md5": md5, "sha256": sha256, "bytes": file.stat().st_size, "note": note}
    index.entries[digest] = entry
    _use(index, digest, entry)
    _link(file, index.unfinished / digest)
    write_atomic(index.unfinished / f"{digest}.json", json.dumps(entry).encode())
    return entry


def part(index: Index) -> Index:
    """What another process that works for the one with this index needs to `remember` in its place; small to send."""
    return replace(index, entries={}, used={})


def join(index: Index, made: Mapping[str, dict[str, Any]]) -> None:
    """Take over what another process remembered in its `part` of this index, by digest."""
    for digest, entry in made.items():
        index.entries[digest] = entry
        _use(index, digest, entry)


def is_remembered(index: Index, digest: str) -> bool:
    """Whether this run, by whichever of its processes, or one that was killed before it, has made this file."""
    return (index.unfinished / f"{digest}.json").exists()


def _use(index: Index, digest: str, entry: dict[str, Any]) -> None:
    index.used.pop(digest, None)
    index.used[digest] = entry


def recover(paths: Paths, stage: str, file: Path) -> bool:
    """Put back the file that dvc.lock records as an output of `stage`, out of DVC's cache; whether that was possible."""
    try:
        outs = read_params(paths.root / "dvc.lock")["stages"][stage]["outs"]
    except (ValueError, KeyError, TypeError):
        return False
    recorded = [out["md5"] for out in outs if out.get("path") == file.relative_to(paths.root).as_posix()]
    for md5 in recorded:
        kept = cache_folder(paths.root) / md5[:2] / md5[2:]
        if kept.is_file() and _hash(kept, hashlib.md5(usedforsecurity=False)) == [md5]:
            write_atomic(file, kept.read_bytes())
            return True
    return False


def cache_folder(root: Path) -> Path:
    """The folder of DVC's cache that holds files by their MD5; it need not exist."""
    for name in ("config.local", "config"):
        config = configparser.RawConfigParser(strict=False)
        with suppress(OSError, configparser.Error):
            config.read_string((root / ".dvc" / name).read_text())
        if folder := config.get("cache", "dir", fallback="").strip().strip("'\""):
            return root / ".dvc" / folder / "files" / "md5"  # an absolute folder replaces what stands before it
    return root / ".dvc" / "cache" / "files" / "md5"


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def _link(file: Path, destination: Path) -> None:
    destination.unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(file), destination)
    except OSError:  # another disk, or one without links
        half = destination.with_name(f".{destination.name}.half")
        try:
            shutil.copyfile(file, half)
            os.replace(half, destination)
        finally:
            half.unlink(missing_ok=True)


def _hash(file: Path, *hashes: Any) -> list[str]:
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            for each in hashes:
                each.update(block)
    return [each.hexdigest() for each in hashes]
