"""Sets of images: the same pictures whatever they lie in, and what does not fit refused in one line with its file."""

import os
import re
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_arrays import forge, header
from test_shards import Project
from test_sources import config, encoded, picture, put
from test_tars import write_tar

from dit import arrays, imagesets
from dit.imagesets import from_array, from_shards, open_images
from dit.samples import write_npz
from dit.shards import stream_split
from dit.sources import decode

X = np.random.default_rng(0).integers(0, 256, (13, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(13) % 3
FORMS = ("memory", "stored.npz", "compressed.npz", "adm.npz", "plain.npy", "folder", "images.tar", "tars")


def png(image: np.ndarray) -> bytes:
    return encoded(Image.fromarray(image))


def lay(root: Path, form: str, x: np.ndarray = X, labels: np.ndarray = LABELS) -> imagesets.ImageSet:
    """The set `x` in one of the FORMS, opened."""
    path = root / form
    members = {}
    for n, (image, label) in enumerate(zip(x, labels, strict=True)):
        members |= {f"{n:03d}.png": png(image), f"{n:03d}.cls": b"%d" % label}
    if form == "memory":
        return from_array(x, labels)
    if form == "stored.npz":
        write_npz(path, len(x), x.shape[1:3], np.array_split(x, 3), labels)
    elif form == "compressed.npz":
        np.savez_compressed(path, arr_0=x, labels=labels.astype(np.uint8))
    elif form == "adm.npz":
        np.savez(path, x, labels)
    elif form == "plain.npy":
        np.save(path, x)
    elif form == "folder":
        for n, image in enumerate(x):
            put(path, f"{n:03d}.png", content=png(image))
    elif form == "images.tar":
        write_tar(path, members)
    elif form == "tars":
        path.mkdir()
        cut = 2 * (len(x) // 2)
        write_tar(path / "0.tar", dict(islice(members.items(), cut)))
        write_tar(path / "1.tar", dict(islice(members.items(), cut, None)))
    return open_images(path)


@pytest.mark.parametrize("form", FORMS)
def test_any_form_gives_the_same_pictures(tmp_path, form):
    found = lay(tmp_path, form)
    assert (found.count, found.size) == (13, (6, 5))
    assert [list(block) for block in found.blocks(5)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12]]
    for start, stop in ((0, 13), (4, 9), (12, 13), (0, 1), (7, 7)):
        read = found.read(start, stop)
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, X[start:stop])
    for indices in ([0, 4, 5, 6, 12], [9, 2, 3, 2], [], range(1, 13, 4), np.array([3, 4])):
        np.testing.assert_array_equal(found.take(indices), X[np.array(indices, int)])
    if form in ("plain.npy", "folder"):
        assert found.labels is None
    else:
        assert found.labels.dtype == np.int64
        np.testing.assert_array_equal(found.labels, LABELS)


def test_the_digest_names_pictures_and_labels(tmp_path):
    pixels = {lay(tmp_path, form).digest for form in ("memory", "stored.npz", "compressed.npz", "adm.npz")}
    assert len(pixels) == 1
    assert lay(tmp_path, "images.tar").digest == lay(tmp_path, "tars").digest
    others = [from_array(X), from_array(X[::-1], LABELS), from_array(X, LABELS[::-1])]
    others += [from_array(X.reshape(13, 5, 6, 3), LABELS), lay(tmp_path, "folder"), lay(tmp_path, "images.tar")]
    assert len({*pixels, *(found.digest for found in others)}) == 7
    assert lay(tmp_path, "plain.npy").digest == from_array(X).digest


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(5)), st.data())
def test_a_subset_in_any_order_is_what_it_says(tmp_path_factory, order, data):
    form = data.draw(st.sampled_from(FORMS))
    found = lay(tmp_path_factory.mktemp("set"), form, X[:5][list(order)], LABELS[:5])
    indices = data.draw(st.lists(st.integers(0, 4), max_size=6))
    np.testing.assert_array_equal(found.take(indices), X[:5][list(order)][indices])


@contextmanager
def memory() -> Iterator[Callable[[], int]]:
    """The most bytes that were in use within, asked for afterwards."""
    most = 0
    tracemalloc.start()
    try:
        yield lambda: most
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


# Folders


def test_sub_folders_are_labels_where_every_image_is_in_one(tmp_path):
    put(tmp_path, "dog/2.png", "cat/deep/1.png", "cat/0.PNG", ".hidden/9.png", "dog/.9.png")
    put(tmp_path, "notes.txt", "cat/info.npz", content=b"others")
    os.symlink(tmp_path / "dog", tmp_path / "emu")
    os.symlink(tmp_path, tmp_path / "dog" / "circle")
    found = open_images(tmp_path)
    assert found.classes == ["cat", "dog", "emu"] and found.labels.tolist() == [0, 0, 1, 2]
    put(tmp_path, "loose.png")
    assert open_images(tmp_path).labels is None and open_images(tmp_path).count == 5


def test_one_sub_folder_is_no_label(tmp_path):
    put(tmp_path, "images/1.png", "images/0.png")
    found = open_images(str(tmp_path))
    assert found.labels is None and found.count == 2


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"]),
    st.sampled_from(["PNG", "JPEG", "WEBP"]),
    st.integers(0, 99),
)
def test_any_kind_of_image_becomes_what_the_pipeline_makes_of_it(tmp_path_factory, mode, kind, seed):
    folder = tmp_path_factory.mktemp("images")
    if mode == "I;16":
        image = Image.fromarray(np.random.default_rng(seed).integers(0, 2**16, (8, 8)).astype(np.uint16))
    elif mode == "RGBA":
        image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 4), dtype=np.uint8))
    else:
        image = picture(seed, (8, 8)).convert(mode)
    try:
        content = encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
    except OSError:  # this kind has no such mode
        return
    put(folder, f"x.{kind.lower()}", content=content)
    read = open_images(folder).read(0, 1)[0]
    np.testing.assert_array_equal(read, np.asarray(decode(config(source="folder", image_size=8), content)))


def test_grey_levels_and_transparency(tmp_path):
    put(tmp_path, "0.png", content=encoded(Image.new("L", (2, 2), 77)))
    put(tmp_path, "1.png", content=encoded(Image.new("RGBA", (2, 2), (10, 20, 30, 0))))
    put(tmp_path, "2.png", content=encoded(Image.fromarray(np.full((2, 2), 0x4D00, np.uint16))))
    read = open_images(tmp_path).read(0, 3)
    assert np.all(read[0] == 77) and np.all(read[1] == 255) and np.all(read[2] == 0x4D)


# Our own shards


def test_a_split_of_the_shards_is_what_the_pipeline_streams(tmp_path):
    project = Project(tmp_path)
    put(project.source, *[f"{'cat' if n < 25 else 'dog'}/{n:03d}.png" for n in range(45)])
    project.run()
    folder = project.paths.artifacts / "shard"
    digests = set()
    for split, most in (("train", None), ("train", 10), ("train", 1), ("heldout", None), ("train", 1000)):
        streamed = list(stream_split(folder, split, most))
        found = from_shards(folder, split, most)
        np.testing.assert_array_equal(found.read(0, found.count), np.stack([image for _, _, image in streamed]))
        assert found.labels.tolist() == [label for _, label, _ in streamed] and found.classes == ["cat", "dog"]
        digests.add(found.digest)
    assert len(digests) == 5
    (folder / "train" / "g0000-00000.tar").unlink()
    with pytest.raises(ValueError, match=r"g0000-00000\.tar is torn.*No such file"):
        from_shards(folder, "train")
    with pytest.raises(ValueError, match=r"holds no PNG, JPEG or WebP image: name .*\.tar or its folder"):
        open_images(folder)
    with pytest.raises(ValueError, match="holds no shards"):
        from_shards(tmp_path, "train")


def test_a_source_without_labels_has_none(tmp_path):
    project = Project(tmp_path, labels="none", num_classes=0)
    put(project.source, *[f"{n:03d}.png" for n in range(25)])
    project.run()
    found = from_shards(project.paths.artifacts / "shard", "train")
    assert found.labels is None and found.classes is None


def test_an_empty_split_is_refused(tmp_path):
    project = Project(tmp_path, held_out_fraction=0.0)
    put(project.source, "cat/0.png", "dog/0.png")
    with pytest.raises(ValueError, match="heldout images of .*shard: there are none: change data.held_out_fraction"):
        from_shards(project.run().folder, "heldout")


# What does not fit


def refused(path: Path, message: str, read: bool = True) -> None:
    with pytest.raises(ValueError, match=message) as error:
        found = open_images(path)
        if read:
            found.read(0, found.count)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "x, message",
    [
        (X.astype(np.float32), r"is float32 \(13, 6, 5, 3\): ADM's evaluator and this one take `arr_0`, uint8"),
        (X.astype(np.int64), "is int64"),
        (X.transpose(0, 3, 1, 2).copy(), r"\(13, 3, 6, 5\) \(colours come last: transpose"),
        (X[..., 0], r"uint8 \(13, 6, 5\): ADM"),
        (X[..., :1], r"uint8 \(13, 6, 5, 1\): ADM"),
        (X[0], r"uint8 \(6, 5, 3\): ADM"),
        (X[:0], "holds no images"),
        (X[:, :0], "holds no images"),
        (np.array([{}, {}]), "is object"),
        (np.asfortranarray(X), "lies column by column"),
    ],
)
def test_arrays_of_another_form_are_refused(tmp_path, x, message):
    np.savez(tmp_path / "x.npz", x)
    refused(tmp_path / "x.npz", r"x\.npz: arr_0 .*" + message)
    np.save(tmp_path / "x.npy", x)
    refused(tmp_path / "x.npy", r"x\.npy .*" + message)


def test_what_is_no_set_of_images_is_refused(tmp_path):
    refused(tmp_path / "none", "none is not there")
    (tmp_path / "x.zip").write_bytes(b"")
    refused(tmp_path / "x.zip", r"images come as \.npz, \.npy, \.tar, or a folder of them; \.zip is none")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty holds no PNG, JPEG or WebP image: put some there")
    np.savez(tmp_path / "x.npz", mu=X, sigma=X)
    refused(tmp_path / "x.npz", r"x\.npz has no array arr_0 \(it has mu, sigma\): ADM's")
    refused(write_tar(tmp_path / "x.tar", {"readme": b""}), r"x\.tar holds no PNG")
    put(tmp_path / "sample", "grid.png")
    np.savez(tmp_path / "sample" / "samples.npz", X)
    refused(tmp_path / "sample", r"holds both grid\.png and samples\.npz: name the file that is meant")
    (tmp_path / "sample" / "grid.png").unlink()
    refused(tmp_path / "sample", r"holds no PNG.*: name .*samples\.npz or its folder")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "content, message",
    [
        (encoded(picture(1, (8, 9))), r"is 8 x 9, the first image \(.*0\.png\) 9 x 8: images of one set must be"),
        (encoded(picture(1))[:-30], "is damaged"),
        (encoded(picture(1))[:60], "is damaged"),
        (b"", "is empty: replace or remove it"),
        (b"GIF89a", "is neither a PNG, nor a JPEG, nor a WebP image"),
    ],
)
def test_images_that_do_not_fit_are_refused_by_name(tmp_path, content, message, packed):
    files = {"0.png": encoded(picture(0)), "1.png": encoded(picture(1)), "2.png": content, "3.png": b"never read"}
    if packed:
        path = write_tar(tmp_path / "x.tar", files)
    else:
        path = tmp_path / "folder"
        for name, file in files.items():
            put(path, name, content=file)
    refused(path, re.escape(str(path)) + r".*2\.png " + message)


def test_a_torn_jpeg_and_a_torn_webp_are_refused(tmp_path):
    for number, kind in enumerate(("JPEG", "WEBP")):
        put(tmp_path / kind, "0.png")
        put(tmp_path / kind, f"1.{kind.lower()}", content=encoded(picture(number), kind)[:-20])
        refused(tmp_path / kind, r"1\.\w+ is damaged")


def test_a_picture_that_unpacks_to_too_much_is_refused_before_it_does(tmp_path, monkeypatch):
    bomb = encoded(Image.new("1", (9000, 9000)))  # 10 kB
    assert len(bomb) < 20_000
    put(tmp_path / "folder", "0.png", content=bomb[:200])  # unpacked, it would count as torn
    write_tar(tmp_path / "x.tar", {"0.png": bomb})
    with memory() as peak:
        refused(tmp_path / "folder", r"0\.png tells of 9000 x 9000 pixels, and above 67108864 no image is opened")
        refused(tmp_path / "x.tar", r"x\.tar: 0\.png tells of 9000 x 9000 pixels")
    assert peak() < 1_000_000
    monkeypatch.setattr(imagesets, "MOST_PIXELS", 29)
    np.savez(tmp_path / "x.npz", X)
    refused(tmp_path / "x.npz", r"x\.npz: arr_0 tells of 5 x 6 pixels, and above 29 no image is opened")


def test_an_npz_that_claims_more_than_it_holds_is_refused(tmp_path):
    claim = header((10**6, 64, 64, 3))
    refused(forge(tmp_path / "x.npz", claim + bytes(99)), r"x\.npz: arr_0 is torn or forged", read=False)
    refused(forge(tmp_path / "x.npz", claim, zipfile.ZIP_STORED), r"x\.npz: arr_0 is torn or forged", read=False)


def test_a_file_that_goes_away_is_named(tmp_path):
    put(tmp_path, "0.png", "1.png")
    found = open_images(tmp_path)
    (tmp_path / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1\.png could not be read \(No such file or directory\)"):
        found.read(0, 2)


@pytest.mark.parametrize("form", ["stored.npz", "compressed.npz", "tars", "folder"])
def test_memory_is_that_of_what_is_read(tmp_path, form, monkeypatch):
    monkeypatch.setattr(arrays, "PIECE_BYTES", 1 << 14)
    x = np.random.default_rng(1).integers(0, 256, (240, 32, 32, 3), dtype=np.uint8)
    lay(tmp_path, form, x, np.zeros(240, int))
    with memory() as peak:
        found = open_images(tmp_path / form)
        total = sum(int(found.read(block.start, block.stop).sum()) for block in found.blocks(10))
        assert total == x.sum(dtype=int) and len(found.digest) == 64
    assert peak() < x.nbytes / 2
