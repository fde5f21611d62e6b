"""What a folder of images holds, before any setting is chosen: how many, how large, which classes, what is amiss.

Listing and decoding are the pipeline's own (sources.py), so what is counted here as readable is what `shard` will read.
Files of equal length are compared by content hash; of a large folder, a spread of `LOOKED_AT` images is opened.
"""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from dit.files import list_images, read_content
from dit.shards import held_out
from dit.sources import DataConfig, Entry, Listing, Row, Unreadable, content_hash, decode

LOOKED_AT = 2_000  # images opened
COMPARED = 50_000  # images up to which copies are looked for: beyond, every other file has another's length
ARCHIVED = "__MACOSX"  # what an archive packed on a Mac leaves beside the images: no class
LEAST = 16  # images below which there is nothing to learn from


@dataclass(frozen=True)
class Survey:
    """What was found in `folder`."""

    folder: str
    count: int  # images by their names
    others: int  # files that are no images by their names
    classes: dict[str, int]  # images of each sub-folder, sorted; empty where the folder is flat
    opened: int  # images that were looked into; the figures below are theirs
    sides: tuple[int, int, int]  # pixels, of the shorter side: smallest, median, largest
    modes: dict[str, int]  # Pillow's names, the most frequent first
    unreadable: list[tuple[str, str]]  # key and reason
    copies: int | None  # images that equal another to the last byte; None where they were not looked for
    without: list[str] = field(default_factory=list)  # sub-folders that hold no image
    keys: list[str] = field(default_factory=list)  # all images, sorted
    contents: dict[str, str] = field(default_factory=dict)  # sha256 of those opened; "" where the file gave nothing


def survey(folder: str) -> Survey:
    """Look at a folder. Raises ValueError, one line, where no model can be trained on it as it is."""
    # A folder, also where it is called as the embedded source is.
    source = "./digits" if folder == "digits" else folder
    data = DataConfig("survey", source, "none", 0, 64, False, 0.0, 0, 1, 0.0)
    try:
        str(Path(folder).expanduser().resolve()).encode()
        found = list_images(data)
    except UnicodeEncodeError:
        raise ValueError(f"the folder's path {folder!r} is not valid UTF-8: rename it") from None
    except RuntimeError as error:  # of ~nobody
        raise ValueError(f"{folder!r}: {error}") from None
    except ValueError as error:
        hint = "; the embedded digits are `dit preset digits`" if folder == "digits" else ""
        raise ValueError(str(error).replace("data.source: ", "", 1) + hint) from None
    keys = [entry.key for entry in found.images]
    classes = classes_of(folder, keys)
    if len(keys) < LEAST:
        raise ValueError(
            f"{folder!r} holds {len(keys)} images: at least {LEAST} are needed, and some hundreds for a start"
        )
    picked = [keys[i * len(keys) // LOOKED_AT] for i in range(LOOKED_AT)] if len(keys) > LOOKED_AT else keys
    sides, modes, unreadable, contents = [], Counter[str](), [], {}
    for key in picked:
        contents[key] = ""
        try:
            content = read_content(data, key)
            contents[key] = content_hash(content)
            mode, side = _look(data, content)
        except (OSError, Unreadable) as error:
            unreadable.append((key, getattr(error, "strerror", None) or str(error)))
            continue
        sides.append(side)
        modes[mode] += 1
    if len(sides) < LEAST:
        key, reason = unreadable[0]
        raise ValueError(
            f"{folder!r}: {len(unreadable)} of {len(picked)} images cannot be read ({key}: {reason}): replace them"
        )
    copies = count_copies(data, found.images) if len(keys) <= COMPARED else None
    spread = (min(sides), round(median(sides)), max(sides))
    counted = (len(keys), found.others, classes, len(picked), spread, dict(modes.most_common()), unreadable, copies)
    return Survey(source, *counted, without_images(folder, keys), keys, contents)


def without_images(folder: str, keys: Sequence[str]) -> list[str]:
    """The sub-folders, neither hidden nor an archive's leftovers, in which no image was found."""
    used = {key.partition("/")[0] for key in keys} | {ARCHIVED}
    below = Path(folder).expanduser().iterdir()
    return sorted(path.name for path in below if path.name not in used and path.name[0] != "." and path.is_dir())


def learnable(found: Survey, data: DataConfig) -> dict[str, int]:
    """How many readable images of each class (of "" without classes) a first run trains on: shard's own choice.

    Exact where all images were opened; the others are taken for readable, and for no copies. Raises ValueError, one
    line, where the pipeline would refuse what is left.
    """
    labels = {name: label for label, name in enumerate(found.classes)}
    rows = []
    for number, key in enumerate(found.keys):
        sha256 = found.contents.get(key, f"not opened: {key}")
        rows.append(Row(key, 0, sha256, labels.get(key.partition("/")[0], 0), 0, number))
    held = held_out(Listing(data.source, data.labels, list(found.classes), rows), data)
    bad = {key for key, _ in found.unreadable}
    names = list(found.classes) or [""]
    left = Counter({name: 0 for name in names})
    left.update(names[row.label] for row in rows if row.key not in held and row.key not in bad)
    share = f"{data.held_out_fraction:.0%} of the images"
    if starved := [name for name in names if not left[name]]:
        shown = ", ".join(map(repr, starved[:3])) + ", ..." * bool(starved[3:])
        raise ValueError(
            f"{found.folder!r}: {len(starved)} of {len(names)} classes ({shown}) would have no readable image left to "
            f"train on when {share} are held out: add images to them, or take them away"
        )
    if held <= bad:
        raise ValueError(
            f"{found.folder!r}: holding out {share} leaves none to judge by (copies stay together): add some"
        )
    return dict(left)


def refused(found: Survey, limit: float) -> bool:
    """Whether more images are unreadable than data.max_bad_fraction lets pass, of those opened."""
    return len(found.unreadable) > limit * found.opened


def classes_of(folder: str, keys: Sequence[str]) -> dict[str, int]:
    """Images of each first-level sub-folder. Raises ValueError where some lie outside one, or there is one class only."""
    archived = sum(key.startswith(f"{ARCHIVED}/") for key in keys)
    if archived:
        raise ValueError(
            f"{str(Path(folder) / ARCHIVED)!r} holds {archived} images: an archive packed on a Mac leaves that folder, "
            "and it is no class: delete it"
        )
    loose = [key for key in keys if "/" not in key]
    if loose and len(loose) < len(keys):
        raise ValueError(
            f"{folder!r} holds {len(loose)} images beside its sub-folders ({loose[0]!r}, ...): "
            "move each into the sub-folder of its class, or all into one flat folder"
        )
    counted = Counter(key.partition("/")[0] for key in keys) if not loose else {}
    if len(counted) == 1:
        (name,) = counted
        raise ValueError(
            f"{folder!r} has one class only ({name!r}): give {str(Path(folder) / name)!r} for a model without classes, "
            "or add a sub-folder for each other class"
        )
    return dict(sorted(counted.items()))


def count_copies(data: DataConfig, images: Sequence[Entry]) -> int:
    """Images whose bytes are another's too, all but one of each kind counted."""
    lengths = Counter(entry.bytes for entry in images)
    contents = Counter[str]()
    for entry in images:
        if lengths[entry.bytes] > 1:
            try:
                contents[content_hash(read_content(data, entry.key))] += 1
            except OSError:
                continue
    return sum(count - 1 for count in contents.values())


def describe(found: Survey, limit: float = 0.01) -> list[str]:
    """The survey as lines for a person; `limit` is data.max_bad_fraction."""
    lines = [
        f"{found.count:,} images in {found.folder}" + (f" (and {found.others:,} other files)" if found.others else "")
    ]
    if found.classes:
        sizes = sorted(found.classes.values())
        shown = ", ".join(f"{name} {count:,}" for name, count in list(found.classes.items())[:12])
        more = ", ..." if len(sizes) > 12 else ""
        lines.append(f"{len(sizes)} classes of {sizes[0]:,} to {sizes[-1]:,} images: {shown}{more}")
    else:
        lines.append("no classes: the images lie in one flat folder")
    low, middle, high = found.sides
    modes = ", ".join(f"{mode} {count:,}" for mode, count in found.modes.items())
    part = f" (of {found.opened:,} looked at)" if found.opened < found.count else ""
    lines.append(f"shorter side {low} to {high} pixels, median {middle}; modes {modes}{part}")
    if found.without:
        shown = ", ".join(map(repr, found.without[:5])) + ", ..." * bool(found.without[5:])
        lines.append(f"no PNG, JPEG or WebP image in {shown}: no class is made of that")
    if found.unreadable:
        shown = "; ".join(f"{key!r}: {reason}" for key, reason in found.unreadable[:3])
        shown += "; ..." * bool(found.unreadable[3:])
        count = f"{len(found.unreadable):,} of {found.opened:,} images cannot be read"
        if refused(found, limit):
            share = len(found.unreadable) / found.opened
            lines.append(
                f"{count}, {share:.1%}, and the pipeline refuses more than {100 * limit:g}% ({shown}): "
                "repair or remove them, or raise data.max_bad_fraction in params.yaml"
            )
        else:
            lines.append(f"{count} and will be left out ({shown})")
    if found.copies is None:
        lines.append(f"copies were not looked for (more than {COMPARED:,} images)")
    elif found.copies:
        lines.append(
            f"{found.copies:,} are exact copies of others: the model sees those more often; copies are held out together or not at all"
        )
    return lines


def _look(data: DataConfig, content: bytes) -> tuple[str, int]:
    from PIL import Image

    decode(data, content)  # the whole of it: a torn file shows only then
    with Image.open(io.BytesIO(content)) as image:
        return image.mode, min(image.size)
