"""A glance at a source: has any file come, gone or changed since the last glance? Costs a listing; reads no image.

It may err on the side of change (a file that was only touched): `scan`, which compares contents, has the last word.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from dit import storage
from dit.archives import is_archive
from dit.files import Files, open_source
from dit.paths import Paths, write_json
from dit.places import OutOfReach
from dit.sources import SUFFIXES, DataConfig


@dataclass(frozen=True)
class Glance:
    """What a source showed: how many files that matter, and one digest of all their names, sizes and times."""

    files: int
    digest: str


def look(data: DataConfig, paths: Paths) -> Glance:
    """List the images, archives and labels file of data.source. Raises ValueError, one line, where it can't be."""
    source = open_source(data, bucket=storage.Bucket, given=paths.given)
    head = hashlib.sha256(f"{data.source}\n{data.labels}\n".encode())
    if not isinstance(source, Files):  # embedded: as constant as the library that it comes with
        return Glance(len(source.look(data.labels).images), head.hexdigest())
    try:
        stamps = sorted(
            (file.name, *map(str, file.stamp))
            for file in source.place.files()
            if file.name.lower().endswith(SUFFIXES) or is_archive(file.name) or file.name == data.labels
        )
    except OutOfReach as error:
        raise ValueError(str(error)) from None
    for stamp in stamps:
        head.update(json.dumps(stamp).encode())
    return Glance(len(stamps), head.hexdigest())


def last(paths: Paths, name: str) -> Glance | None:
    """The glance kept last of this data set; None where there is none."""
    try:
        return Glance(**json.loads(_file(paths, name).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def keep(paths: Paths, name: str, seen: Glance) -> None:
    """Remember it for the next time."""
    write_json(_file(paths, name), asdict(seen))


def _file(paths: Paths, name: str) -> Path:
    return paths.memory / "probe" / f"{name}.json"
