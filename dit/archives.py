"""Images inside of archives, where they lie: tar (WebDataset's too), zip, parquet as Hugging Face writes it.

An archive is read through once: its index says of each image where it lies, its content's hash and, if the archive tells,
its label. After that any image is one piece of the archive. Nothing is unpacked to disk, and what points outside of the
archive, overlaps, or tells of more than it holds is refused.
"""

import hashlib
import json
import tarfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from dit.paths import write_atomic
from dit.places import File, Place, hidden, opened
from dit.sources import SUFFIXES
from dit.tars import read_label, require_harmless, whole_members

ENDINGS = (".tar", ".zip", ".parquet")
PACKED = (
    ".tar.gz",
    ".tgz",
    ".tar.bz2",
    ".tar.xz",
    ".tar.zst",
    ".7z",
    ".rar",
)  # no piece can be read without all before
MOST_BYTES = 1 << 28  # of one image's file: more is a bomb or a mistake
MOST_GROUP_BYTES = 1 << 32  # of the images of one row group of a parquet file, which are read together
FORMAT = 1  # of the remembered index
SIDECARS = ("cls", "json", "txt")  # a tar that has one of them beside an image is a WebDataset shard
Label = tuple[int, str]  # the archive's own number of a class, and its name


class Member(NamedTuple):
    """One image of an archive."""

    name: str
    bytes: int  # of the image's file
    start: int  # where its piece begins; of a parquet file, the row group
    length: int  # of the piece; of a parquet file, the row in its group
    method: str  # "" plain, "deflate", or "row <column>"
    sha256: str  # "" where it cannot be read
    label: Label | None


def is_archive(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


def index(place: Place, file: File, memory: Path | None) -> list[Member]:
    """The images of an archive, remembered in the folder `memory` as long as its stamp stays. Raises ValueError."""
    name = hashlib.sha256(json.dumps([place.name, file.name]).encode()).hexdigest()[:24]
    kept = memory / f"{name}.json" if memory else None
    told = [FORMAT, file.name, *file.stamp]
    if kept:
        try:
            remembered = json.loads(kept.read_bytes())
            if remembered["of"] == told:
                return [Member(*row[:6], row[6] and tuple(row[6])) for row in remembered["members"]]
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            pass
    settled = abs(time.time_ns() - file.mtime_ns) > place.unsettled_ns
    members = list(_of_kind(place, file))
    if len({member.name for member in members}) < len(members):
        seen: set[str] = set()
        twice = next(member.name for member in members if member.name in seen or seen.add(member.name))
        raise ValueError(f"data.source: {file.name} holds {twice!r} twice: keep one")
    if kept and settled:
        content = json.dumps({"of": told, "members": members}, separators=(",", ":"))
        write_atomic(kept, content.encode())
    return members


def read_member(place: Place, file: File, member: Member) -> bytes:
    """An image's file. Raises OSError where it is not to be had."""
    version = file.identity if isinstance(file.identity, str) else ""
    if member.method.startswith("row "):
        with _row_groups:  # whoever else wants the same one waits, and has it then
            return _row_group(place, file, member.start, member.method.removeprefix("row "))[member.length]
    content = place.read(file.name, member.start, member.length, version=version)
    if member.method != "deflate":
        return content
    try:
        return _inflate(content, member.bytes)
    except zlib.error as error:
        raise OSError(None, str(error)) from None


def _of_kind(place: Place, file: File) -> Iterator[Member]:
    told = f"data.source: {file.name}"
    reader = {".tar": _in_tar, ".zip": _in_zip, ".parquet": _in_parquet}[PurePosixPath(file.name).suffix.lower()]
    try:
        with opened(place, file) as content:
            yield from reader(told, content, file.bytes)
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, NotImplementedError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{told} is torn, or not what its name says ({reason}): copy or make it again") from None


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not hidden(name) and not name.startswith("__MACOSX/")


def _plain(name: str) -> str:
    return str(PurePosixPath(name))  # without ./ and doubled slashes


def _bounded(told: str, name: str, size: int) -> None:
    if size > MOST_BYTES:
        raise ValueError(f"{told}: {name!r} tells of {size} bytes, and above {MOST_BYTES} none is read: remove it")


# Tar


def _in_tar(told: str, file: BinaryIO, size: int) -> Iterator[Member]:
    images: list[Member] = []
    labels: dict[str, Label] = {}
    beside: set[str] = set()
    for member in whole_members(told, file, size):
        if not member.isfile():
            continue
        key, extension = _sample(member.name)
        file.seek(member.offset_data)
        if _is_image(name := _plain(member.name)):
            _bounded(told, name, member.size)
            content = file.read(member.size)
            sha256 = hashlib.sha256(content).hexdigest()
            images.append(Member(name, member.size, member.offset_data, member.size, "", sha256, None))
        elif extension == "cls":
            number = read_label(told, member.name, file.read(min(member.size, 21)))
            labels[key] = number, str(number)
        if extension in SIDECARS:
            beside.add(key)
    if not any(_sample(image.name)[0] in beside for image in images):
        yield from images
        return
    samples: dict[str, Member] = {}  # WebDataset: a sample's image is <key>.png, and <key>.mask.png is something else
    for image in images:
        key, extension = _sample(image.name)
        if f".{extension.lower()}" not in SUFFIXES:
            continue
        if key in samples:
            raise ValueError(f"{told}: {image.name} is a second image beside {samples[key].name}: keep one")
        samples[key] = image._replace(label=labels.get(key))
    bare = [image.name for image in samples.values() if image.label is None]
    if labels and bare:
        raise ValueError(f"{told}: {bare[0]} has no label (.cls), but others have: give all or none of them")
    yield from samples.values()


def _sample(name: str) -> tuple[str, str]:
    """WebDataset's key and extension: the extension begins at the first dot of the last part."""
    folder, _, last = _plain(name).rpartition("/")
    key, _, extension = last.partition(".")
    return f"{folder}/{key}", extension


# Zip


def _in_zip(told: str, file: BinaryIO, size: int) -> Iterator[Member]:
    with zipfile.ZipFile(file) as archive:
        members = sorted(archive.infolist(), key=lambda member: member.header_offset)
        ends = [member.header_offset for member in members[1:]] + [archive.start_dir]
        for member, end in zip(members, ends, strict=True):
            require_harmless(told, member.filename)
            if member.is_dir() or not _is_image(name := _plain(member.filename)):
                continue
            _bounded(told, name, member.file_size)
            if member.flag_bits & 0x41:
                raise ValueError(f"{told}: {name!r} is encrypted: make the archive without a password")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(
                    f"{told}: {name!r} is compressed in a way not read here: make it with deflate or store"
                )
            file.seek(member.header_offset)
            header = file.read(30)
            start = member.header_offset + 30 + int.from_bytes(header[26:28], "little")
            start += int.from_bytes(header[28:30], "little")
            if header[:4] != b"PK\3\4" or start + member.compress_size > end:
                raise ValueError(f"{told}: {name!r} overlaps another, or is forged: make the archive again")
            file.seek(start)
            content = file.read(member.compress_size)
            method = "deflate" if member.compress_type == zipfile.ZIP_DEFLATED else ""
            try:
                content = _inflate(content, member.file_size) if method else content
            except zlib.error:
                content = b""
            whole = len(content) == member.file_size and zlib.crc32(content) == member.CRC
            sha256 = hashlib.sha256(content).hexdigest() if whole else ""
            yield Member(name, member.file_size, start, member.compress_size, method, sha256, None)


def _inflate(content: bytes, size: int) -> bytes:
    """Deflated bytes, unpacked; never more than one byte above what they shall be."""
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)


# Parquet


def _in_parquet(told: str, file: BinaryIO, size: int) -> Iterator[Member]:
    table = _parquet(told, file)
    image, label, named = _columns(told, table.schema_arrow)
    row = 0
    for group in range(table.num_row_groups):
        _bounded_group(told, table, group)
        contents, paths = _images(table, group, image)
        labels = table.read_row_group(group, columns=[label]).column(0).to_pylist() if label else [None] * len(contents)
        for number, (content, path) in enumerate(zip(contents, paths, strict=True)):
            ending = PurePosixPath(path or "").suffix.lower()
            name = f"{row:08d}{ending if ending in SUFFIXES else ''}"  # by row: rows of a group are read together
            told_label = named(labels[number], name) if label else None
            sha256 = hashlib.sha256(content).hexdigest() if content is not None else ""
            yield Member(name, len(content or b""), group, number, f"row {image}", sha256, told_label)
            row += 1


def _parquet(told: str, file: BinaryIO) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{told}: parquet files need pyarrow, which is missing: pip install pyarrow") from None
    try:
        return parquet.ParquetFile(file)
    except pyarrow.ArrowException as error:
        raise OSError(None, " ".join(str(error).split())) from None


def _columns(told: str, schema: Any) -> tuple[str, str | None, Callable[[Any, str], Label]]:
    """The column of images, that of labels, and what a value of that says."""
    import pyarrow

    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    kinds = {name: kind.get("_type") for name, kind in features.items() if isinstance(kind, dict)}
    fields = {name: schema.field(name).type for name in schema.names}
    images = [name for name in fields if kinds.get(name) == "Image"] or [
        name for name, kind in fields.items() if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    ]
    if not images:
        raise ValueError(
            f"{told} has no column of images (it has {', '.join(schema.names[:6])}): save it by `datasets`"
        )
    classes = [name for name in fields if kinds.get(name) == "ClassLabel"] or [
        name
        for name in ("label", "labels", "class")
        if name in fields and (pyarrow.types.is_integer(fields[name]) or pyarrow.types.is_string(fields[name]))
    ]
    if len(images) > 1 or len(classes) > 1:
        raise ValueError(
            f"{told} has several columns of images or labels ({', '.join(images + classes)}): keep one each"
        )
    label = classes[0] if classes else None
    names = features.get(label, {}).get("names") if label else None

    def named(value: Any, name: str) -> Label:
        if isinstance(value, str):
            return 0, value
        if value is None or value < 0 or (names and value >= len(names)):
            raise ValueError(f"{told}: image {name} has the label {value}, which no class has: remove it")
        return value, names[value] if names else str(value)

    return images[0], label, named


def _bounded_group(told: str, table: Any, group: int) -> None:
    size = table.metadata.row_group(group).total_byte_size
    if size > MOST_GROUP_BYTES:
        raise ValueError(f"{told}: a row group of {size} bytes: save it with smaller row groups, such as 100 images")


def _images(table: Any, group: int, column: str) -> tuple[list[bytes | None], list[str | None]]:
    import pyarrow

    try:
        values = table.read_row_group(group, columns=[column]).column(0).to_pylist()
    except pyarrow.ArrowException as error:
        raise OSError(None, " ".join(str(error).split())) from None
    return [value and value.get("bytes") for value in values], [value and value.get("path") for value in values]


_row_groups = threading.Lock()


@lru_cache(maxsize=4)
def _row_group(place: Place, file: File, group: int, column: str) -> list[bytes]:
    with opened(place, file) as content:
        return _images(_parquet(file.name, content), group, column)[0]
