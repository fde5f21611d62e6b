"""README.md names things that exist."""

import re
from pathlib import Path

from dit.check import STAGES
from dit.presets import names

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_every_path_of_the_tree_exists():
    tree = TEXT.partition("## The tree\n\n```\n")[2].partition("```")[0]
    folder, seen = Path(), 0
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            path = ROOT / (folder / name if indent else name)
            assert path.exists(), f"README's tree names {path.relative_to(ROOT)}, which does not exist"
            seen += 1
            if not indent:
                folder = Path(name)
    assert seen > 30


def test_every_room_is_in_the_tree():
    for file in (ROOT / "dit").glob("*.py"):
        small = {
            "__init__",
            "paths",
            "randomness",
            "progress",
            "schedule",
            "grids",
            "torchvision_cpu",
            "store",
            "outbox",
            "provenance",
        }
        assert file.stem in small or file.name in TEXT, f"README's tree lacks {file.name}"


def test_every_command_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    said = set(re.findall(r"(?:^|`)make ([a-z]+)", TEXT, re.M))
    assert {"repro", "test", "up", "down", "help"} <= said <= targets
    assert {f"`{stage}`" for stage in STAGES} <= set(re.findall(r"`\w+`", TEXT))
    assert {f"`{name}`" for name in names(ROOT / "presets")} <= set(re.findall(r"`[\w-]+`", TEXT))
