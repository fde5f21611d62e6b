"""A colour data set from Debian's packages: 2,871 emoji of the font Noto Color Emoji, twelve classes, 128 pixels.

    apt-get install fonts-noto-color-emoji unicode-data
    python benchmarks/emoji.py FOLDER
    dit init FOLDER --no-mirror && dvc repro

The classes are Unicode's emoji groups (emoji-test.txt), of which "People & Body" is four here, so that no class is much
larger than the others; for the same reason hands come in all five skin tones and people in three. Each emoji that the
font draws as one glyph becomes a PNG on white, FOLDER/<class>/<code points>.png; glyphs that equal an earlier one to
the last byte (the flag of Norway is that of two of its islands too) are left out. The pictures depend on the packages'
versions and on nothing else. A person in another skin tone is nearly the same picture: that some such pairs are
divided between training and held-out images makes the floors of the metrics a little low. The font is under the SIL
Open Font License 1.1, Unicode's table under the Unicode licence; the data set is not part of this repository.
"""

import argparse
import hashlib
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
TABLE = Path("/usr/share/unicode/emoji/emoji-test.txt")
BITMAP_SIZE = 109  # the one size, in pixels per em, that the font holds; its pictures are 136 x 128 pixels
SIDE = 128  # pixels, of the pictures written
CLASSES = {
    "Smileys & Emotion": "smileys",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activities",
    "Objects": "objects",
    "Symbols": "symbols",
    "Flags": "flags",
}
PEOPLE = {"hand": "hands", "body-parts": "hands", "person-role": "roles", "person-fantasy": "roles"}
PEOPLE |= {"person-gesture": "persons", "person-": "actions", "person": "persons", "family": "actions"}
LIGHT, _, MEDIUM, _, DARK = TONES = range(0x1F3FB, 0x1F400)


def main() -> int:
    """Write the data set; exit status 2 where a package is missing."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    missing = [str(file) for file in (FONT, TABLE) if not file.is_file()]
    if missing or not features.check("raqm"):
        what = f"{missing[0]} is missing" if missing else "Pillow has no raqm (libfribidi0 is missing)"
        print(f"{what}: apt-get install fonts-noto-color-emoji unicode-data libfribidi0", file=sys.stderr)
        return 2
    print(", ".join(f"{name} {count}" for name, count in sorted(write(folder).items())))
    return 0


def write(folder: Path) -> Counter[str]:
    """Draw every emoji of the table into `folder`; returns the number of pictures of each class."""
    font = ImageFont.truetype(str(FONT), BITMAP_SIZE, layout_engine=ImageFont.Layout.RAQM)
    seen, written = set(), Counter()
    for name, text in sequences(TABLE.read_text()):
        picture = draw(font, text)
        if picture is None or (content := hashlib.sha256(picture.tobytes()).digest()) in seen:
            continue
        seen.add(content)
        place = folder / name / f"{'-'.join(f'{ord(c):x}' for c in text)}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        picture.save(place)
        written[name] += 1
    return written


def sequences(table: str) -> Iterator[tuple[str, str]]:
    """(class, text) of each fully qualified emoji of emoji-test.txt that the data set takes, in its order."""
    group = subgroup = ""
    for line in table.splitlines():
        if line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.partition(":")[2].strip()
        elif found := re.match(r"([0-9A-F ]+?)\s*; fully-qualified", line):
            points = [int(point, 16) for point in found[1].split()]
            name = CLASSES.get(group) or next(PEOPLE[start] for start in PEOPLE if subgroup.startswith(start))
            tones = {point for point in points if point in TONES}
            if len(tones) < 2 and tones <= (set(TONES) if name == "hands" else {LIGHT, MEDIUM, DARK}):
                yield name, "".join(map(chr, points))


def draw(font: ImageFont.FreeTypeFont, text: str) -> Image.Image | None:
    """The emoji on white, SIDE x SIDE pixels; None where the font has no single glyph for it."""
    width = font.getlength(text)
    left, top, right, bottom = font.getbbox(text)
    if not 0 < width <= 1.3 * BITMAP_SIZE or right <= left or bottom <= top:
        return None
    canvas = Image.new("RGB", (max(right - left, bottom - top),) * 2, "white")
    corner = ((canvas.width - (right - left)) // 2 - left, (canvas.height - (bottom - top)) // 2 - top)
    ImageDraw.Draw(canvas).text(corner, text, font=font, embedded_color=True)
    return canvas.resize((SIDE, SIDE), Image.Resampling.LANCZOS) if canvas.getcolors(1) is None else None


if __name__ == "__main__":
    sys.exit(main())
