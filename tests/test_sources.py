"""Sources: every kind of image file, every kind of folder, and the scan's history."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dit import files, sources
from dit.files import Files
from dit.paths import Paths
from dit.sources import DataConfig, Entry, Found, Listing, Row, Unreadable
from dit.stages.scan import scan, succeed, summary

GOLDEN = np.load(Path(__file__).parent / "golden" / "center_crop.npz")
SETTINGS = dict(
    name="toy",
    source="digits",
    labels="folder",
    num_classes=10,
    image_size=8,
    mirror=False,
    held_out_fraction=0.2,
    split_seed=0,
    shard_images=100,
    max_bad_fraction=0.0,
)


def config(**changes) -> DataConfig:
    return DataConfig(**{**SETTINGS, **changes})


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def picture(seed: int, size: tuple[int, int] = (9, 8)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def put(root: Path, *keys: str, content: bytes | None = None) -> None:
    for key in keys:
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        seed = int.from_bytes(key.encode()[-12:])
        (root / key).write_bytes(encoded(picture(seed)) if content is None else content)


def flat(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"name": "FID 1"}, "name must be"),
        ({"source": " "}, "source must be"),
        ({"labels": "none"}, "num_classes must be 0"),
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"image_size": 4}, "image_size must be at least 8, got 4"),
        ({"shard_images": 0}, "shard_images must be at least 1, got 0"),
        ({"split_seed": -1}, "split_seed must be at least 0, got -1"),
        ({"held_out_fraction": 1.0}, "held_out_fraction must be"),
        ({"held_out_fraction": float("nan")}, "held_out_fraction must be"),
        ({"max_bad_fraction": -0.1}, "max_bad_fraction must be"),
    ],
)
def test_bad_settings_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        config(**changes)


# Pictures


@pytest.mark.parametrize("number", [0, 1, 2, 4])
def test_center_crop_equals_the_reference(number):
    cropped = flat(sources.center_crop(Image.fromarray(GOLDEN[f"in{number}"]), 64))
    difference = np.abs(cropped - GOLDEN[f"out{number}_64"]).max()
    assert difference == 0 if Image.__version__ == "13.0.0" else difference <= 1


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([8, 16, 24]))
def test_center_crop_takes_any_size(width, height, size):
    assert sources.center_crop(Image.new("RGB", (width, height), "red"), size).size == (size, size)


GREY, RED, WHITE = (90, 90, 90), (255, 0, 0), (255, 255, 255)


def palette(transparent: bool) -> bytes:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, *RED])
    return encoded(image, **({"transparency": 1} if transparent else {}))


@pytest.mark.parametrize(
    "content, colour",
    [
        (encoded(Image.new("RGB", (8, 8), RED)), RED),
        (encoded(Image.new("L", (8, 8), 90)), GREY),
        (encoded(Image.new("1", (8, 8), 1)), WHITE),
        (encoded(Image.new("LA", (8, 8), (90, 255))), GREY),
        (encoded(Image.new("LA", (8, 8), (90, 0))), WHITE),
        (encoded(Image.new("RGBA", (8, 8), (*RED, 255))), RED),
        (encoded(Image.new("RGBA", (8, 8), (*RED, 0))), WHITE),
        (encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 128))), (127, 127, 127)),
        (encoded(Image.new("RGB", (8, 8), RED), transparency=RED), WHITE),
        (palette(transparent=False), RED),
        (palette(transparent=True), WHITE),
        (encoded(Image.fromarray(np.full((8, 8), 90 * 256 + 200, np.uint16))), GREY),
        (encoded(Image.new("RGB", (8, 8), GREY), "JPEG"), GREY),
        (encoded(Image.new("L", (8, 8), 90), "JPEG"), GREY),
        (encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 165)), "JPEG"), GREY),
        (encoded(Image.new("RGBA", (8, 8), (*RED, 0)), "WEBP", lossless=True), WHITE),
        (encoded(Image.new("RGB", (8, 8), RED), "WEBP", lossless=True), RED),
    ],
)
def test_every_mode_becomes_rgb_over_white(content, colour):
    image = sources.decode(config(source="any", num_classes=2), content)
    assert (image.mode, image.size, image.info) == ("RGB", (8, 8), {})
    assert np.abs(flat(image) - colour).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, lossless=True)
    assert np.abs(flat(sources.decode(config(source="any"), content)) - RED).max() <= 2


def test_exif_turns_the_image_upright_and_does_not_travel():
    image = picture(1, (8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side: turn clockwise
    content = encoded(image, exif=exif)
    upright = sources.decode(config(source="any"), content)
    assert np.array_equal(flat(upright), np.rot90(flat(image), -1))
    assert b"Exif" not in encoded(upright) and b"eXIf" not in encoded(upright)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "empty file"),
        (b"hello", "neither a PNG, nor a JPEG, nor a WebP image"),
        (encoded(picture(1), "GIF"), "neither a PNG"),
        (encoded(picture(1, (60, 60)))[:3000], "truncated"),
        (encoded(picture(1, (60, 60)), "JPEG")[:900], "truncated"),
        (encoded(Image.new("L", (1, 60_000))), "too narrow"),
    ],
)
def test_what_is_no_picture_says_why(content, reason):
    data = config(source="any", image_size=64)
    with pytest.raises(Unreadable, match=reason) as first:
        sources.decode(data, content)
    with pytest.raises(Unreadable) as second:
        sources.decode(data, bytes(bytearray(content)))
    assert str(first.value) == str(second.value) and "\n" not in str(first.value) and "0x" not in str(first.value)


def test_a_decompression_bomb_is_not_unpacked(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Unreadable, match="DecompressionBomb"):
        sources.decode(config(source="any"), encoded(Image.new("L", (100, 100))))


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    truth = load_digits()
    found = files.list_images(config())
    assert [image.label for image in found.images] == truth.target.tolist()
    assert found.classes == [str(digit) for digit in range(10)]
    for index in (0, 7, 1796):
        image = flat(sources.decode(config(), files.read_content(config(), found.images[index].key)))
        assert np.abs(image - truth.images[index][..., None] * 255 / 16).max() <= 0.5
    assert sources.decode(config(image_size=32), files.read_content(config(image_size=32), "digits/0003")).size == (
        32,
        32,
    )


def test_listing_a_source_needs_neither_torch_nor_sklearn():
    code = """
import sys
from dit.stages.scan import scan
from dit.files import list_images
from dit.sources import DataConfig
list_images(DataConfig("digits", "digits", "folder", 10, 8, False, 0.2, 0, 100, 0.0))
print(sorted({"torch", "sklearn", "webdataset"} & set(sys.modules)))"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# Folders


def test_classes_are_the_sorted_sub_folders(tmp_path):
    put(tmp_path, "zebra/a.PNG", "ant/deep/er/b.jpeg", "ant/c.WebP", "ant/.hidden.png", ".git/d.png", "ant/notes.txt")
    (tmp_path / "empty").mkdir()
    found = files.list_images(config(source=str(tmp_path), num_classes=2))
    assert [(image.key, image.label) for image in found.images] == [
        ("ant/c.WebP", 0),
        ("ant/deep/er/b.jpeg", 0),
        ("zebra/a.PNG", 1),
    ]
    assert (found.classes, found.others) == (["ant", "zebra"], 1)


def test_without_labels_depth_does_not_matter(tmp_path):
    put(tmp_path, "a.png", "x/b.png", "x/y/c.png")
    found = files.list_images(config(source=str(tmp_path), labels="none", num_classes=0))
    assert [(image.key, image.label) for image in found.images] == [("a.png", 0), ("x/b.png", 0), ("x/y/c.png", 0)]
    assert found.classes == []


def test_links_are_followed_but_not_in_circles(tmp_path):
    put(tmp_path, "far/a.png", "set/one/b.png", "set/two/c.png")
    (tmp_path / "set/one/linked").symlink_to(tmp_path / "far")
    (tmp_path / "set/one/up").symlink_to(tmp_path / "set")
    (tmp_path / "set/two/round").symlink_to(tmp_path / "set/one")
    (tmp_path / "set/one/about").symlink_to(tmp_path / "set/two")
    (tmp_path / "set/one/self").symlink_to("self")
    (tmp_path / "set/one/gone.png").symlink_to("nowhere")
    found = files.list_images(config(source=str(tmp_path / "set"), num_classes=2))
    assert [image.key for image in found.images] == [
        "one/about/c.png",
        "one/b.png",
        "one/linked/a.png",
        "two/c.png",
        "two/round/b.png",
        "two/round/linked/a.png",
    ]


@pytest.mark.parametrize(
    "keys, changes, message",
    [
        ([], {}, "data.source: no PNG, JPEG or WebP image in .*: put some there"),
        (["a/x.txt"], {}, r"data.source: no PNG, JPEG or WebP image in .* \(1 other files\)"),
        (["a/x.png"], {}, "data.labels: .* has one class only .'a'.: add a sub-folder"),
        (["a/x.png", "b/x.png"], {"num_classes": 3}, "data.num_classes: is 3, but .* has 2 classes .'a', 'b'."),
        (["a/x.png", "b/x.png", "y.png"], {}, "data.labels: 1 images .'y.png', .*lie directly in"),
        (["y.png"], {}, "data.labels: 1 images .'y.png', .*lie directly in"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_in_one_line(tmp_path, keys, changes, message):
    put(tmp_path, *keys)
    with pytest.raises(ValueError, match=message) as error:
        files.list_images(config(**{"source": str(tmp_path), "num_classes": 2, **changes}))
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data.source: the folder .*absent' is not there"):
        files.list_images(config(source=str(tmp_path / "absent")))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="data.source: .*file' is not a folder"):
        files.list_images(config(source=str(tmp_path / "file")))


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    try:
        put(tmp_path, "a/x.png")
        Path(os.fsdecode(bytes(tmp_path) + b"/a/\xff.png")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(ValueError, match="data.source: .* is not valid UTF-8: rename it"):
        files.list_images(config(source=str(tmp_path), labels="none", num_classes=0))


# The listing and its history


rows = st.builds(
    Row,
    st.text(max_size=8).filter(lambda key: key.isprintable()),
    st.integers(0),
    st.just("ab"),
    *[st.integers(0, 99)] * 3,
)


@given(st.lists(rows, max_size=5), st.lists(st.text("aé\"'/\n", max_size=3), max_size=3))
def test_a_listing_is_read_as_it_was_written(tmp_path_factory, rows, classes):
    listing = Listing("folder", "folder", classes, rows)
    file = tmp_path_factory.mktemp("listing") / "listing.json"
    file.write_bytes(sources.format_listing(listing))
    assert sources.read_listing(file) == listing
    assert json.loads(file.read_text())["columns"] == list(Row._fields)
    assert len(file.read_text().splitlines()) == 8 + max(len(rows), 1)


def test_a_damaged_listing_is_named(tmp_path):
    (tmp_path / "listing.json").write_text("{")
    with pytest.raises(ValueError, match="listing.json is damaged"):
        sources.read_listing(tmp_path / "listing.json")


def generations(listing: Listing) -> dict[str, tuple[int, int]]:
    return {row.key: (row.generation, row.number) for row in listing.rows}


def test_history_gives_each_image_its_place_for_ever(tmp_path, capsys):
    source, paths = tmp_path / "set", Paths(tmp_path)
    data = config(source=str(source), num_classes=2)
    file = paths.artifacts / "scan" / "listing.json"

    def look(data: DataConfig = data) -> Listing:
        scan(data, paths=paths)
        return sources.read_listing(file)

    put(source, "b/1.png", "a/1.png", "b/2.png")
    assert generations(look()) == {"a/1.png": (0, 0), "b/1.png": (0, 1), "b/2.png": (0, 2)}
    assert "3 images in 2 classes of" in (line := capsys.readouterr().out) and "3 new, 0 changed, 0 gone" in line

    before = file.stat()
    look()
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    put(source, "a/0.png")
    put(source, "b/2.png", content=encoded(picture(5)))
    (source / "b/1.png").unlink()
    listing = look()
    assert generations(listing) == {"a/0.png": (1, 0), "a/1.png": (0, 0), "b/2.png": (0, 2)}
    assert "1 new, 1 changed, 1 gone" in capsys.readouterr().out
    assert listing.rows[-1].sha256 == sources.content_hash((source / "b/2.png").read_bytes())

    put(source, "aa/0.png")
    listing = look(config(source=str(source), num_classes=3))
    assert generations(listing) == {"a/0.png": (1, 0), "a/1.png": (0, 0), "aa/0.png": (2, 0), "b/2.png": (0, 2)}
    assert [row.label for row in listing.rows] == [0, 0, 1, 2]
    assert "the classes changed" in capsys.readouterr().out

    listing = look(config(source=str(source), labels="none", num_classes=0))
    assert {generation for generation, _ in generations(listing).values()} == {0}
    assert "the history starts anew" in capsys.readouterr().out


def test_known_hashes_are_remembered_until_the_file_changes(tmp_path, monkeypatch):
    source, paths = tmp_path / "set", Paths(tmp_path)
    data = config(source=str(source), labels="none", num_classes=0)
    put(source, "old.png", "young.png")
    os.utime(source / "old.png", (1e9, 1e9))
    monkeypatch.setattr("dit.stages.scan.UNSETTLED_NS", 3600 * 10**9)  # it stays young, however slow this machine is
    scan(data, paths=paths)

    read = []
    monkeypatch.setattr(Files, "read", lambda self, key, version="": read.append(key) or b"other")
    scan(data, paths=paths)
    assert read == ["young.png"]  # it may still be written to within the same time stamp
    (source / "old.png").write_bytes(b"new")
    scan(data, paths=paths)
    assert sorted(read) == ["old.png", "young.png", "young.png"]


def test_a_file_that_vanishes_or_refuses_while_scanned(tmp_path, monkeypatch, capsys):
    source, paths = tmp_path / "set", Paths(tmp_path)
    put(source, "a.png", "b.png", "c.png")
    errors = {"a.png": FileNotFoundError(), "b.png": PermissionError()}

    def read(self: Files, key: str, version: str = "") -> bytes:
        if key in errors:
            raise errors[key]
        return b"content"

    monkeypatch.setattr(Files, "read", read)
    scan(config(source=str(source), labels="none", num_classes=0), paths=paths)
    rows = sources.read_listing(paths.artifacts / "scan" / "listing.json").rows
    assert [(row.key, bool(row.sha256)) for row in rows] == [("b.png", False), ("c.png", True)]
    assert "1 could not be read" in capsys.readouterr().out


@given(st.lists(st.sets(st.integers(0, 9), min_size=1), min_size=1, max_size=5))
def test_places_are_unique_and_never_move(scans):
    data, before, places = config(source="set", labels="none", num_classes=0), None, {}
    for keys in scans:
        found = Found([Entry(str(key), 1, None, 0) for key in sorted(keys)], [], 0)
        listing = succeed(before, data, found, {str(key): "hash" for key in keys})
        now = generations(listing)
        assert len(set(now.values())) == len(now) == len(keys)
        kept = now.keys() & places.keys()
        assert {key: now[key] for key in kept} == {key: places[key] for key in kept}
        assert f"{len(now.keys() - kept)} new, 0 changed, {len(places.keys() - kept)} gone" in summary(before, listing)
        before, places = listing, now
