"""What a folder of images holds, before any setting is chosen: how many, how large, which classes, what is amiss.

Listing and decoding are the pipeline's own (sources.py), so what is counted here as readable is what `shard` will read.
Files of equal length are compared by content hash; of a large folder, a spread of `LOOKED_AT` images is opened.
"""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from dit.sources import DataConfig, Entry, Unreadable, content_hash, decode, list_images, read_content

LOOKED_AT = 2_000  # images opened
COMPARED = 50_000  # images up to which copies are looked for: beyond, every other file has another's length
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


def survey(folder: str) -> Survey:
    """Look at a folder. Raises ValueError, one line, where no model can be trained on it as it is."""
    data = DataConfig("survey", folder, "none", 0, 64, False, 0.0, 0, 1, 0.0)
    try:
        found = list_images(data)
    except ValueError as error:
        raise ValueError(str(error).replace("data.source: ", "", 1)) from None
    keys = [entry.key for entry in found.images]
    classes = classes_of(folder, keys)
    if len(keys) < LEAST:
        raise ValueError(
            f"{folder!r} holds {len(keys)} images: at least {LEAST} are needed, and some hundreds for a start"
        )
    picked = [keys[i * len(keys) // LOOKED_AT] for i in range(LOOKED_AT)] if len(keys) > LOOKED_AT else keys
    sides, modes, unreadable = [], Counter[str](), []
    for key in picked:
        try:
            mode, side = _look(data, key)
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
    return Survey(
        folder, len(keys), found.others, classes, len(picked), spread, dict(modes.most_common()), unreadable, copies
    )


def classes_of(folder: str, keys: Sequence[str]) -> dict[str, int]:
    """Images of each first-level sub-folder. Raises ValueError where some lie outside one, or there is one class only."""
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


def describe(found: Survey) -> list[str]:
    """The survey as lines for a person."""
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
    if found.unreadable:
        key, reason = found.unreadable[0]
        lines.append(
            f"{len(found.unreadable):,} cannot be read and will be left out{part}: {key} ({reason})"
            + (", ..." if len(found.unreadable) > 1 else "")
        )
    if found.copies is None:
        lines.append(f"copies were not looked for (more than {COMPARED:,} images)")
    elif found.copies:
        lines.append(
            f"{found.copies:,} are exact copies of others: the model sees those more often, and held-out ones may be trained on"
        )
    return lines


def _look(data: DataConfig, key: str) -> tuple[str, int]:
    from PIL import Image

    content = read_content(data, key)
    decode(data, content)  # the whole of it: a torn file shows only then
    with Image.open(io.BytesIO(content)) as image:
        return image.mode, min(image.size)
