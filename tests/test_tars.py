"""WebDataset tars: their images by number; what is torn, forged or points outside is refused in one line."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.tars import Index, index_tar


def write_tar(path: Path, members: dict[str, bytes | tarfile.TarInfo], **options) -> Path:
    """A tar of these members: their bytes, or a header that says something else."""
    with tarfile.open(path, options.pop("mode", "w"), **options) as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def kind(type_: bytes, **told) -> tarfile.TarInfo:
    info = tarfile.TarInfo()
    info.type = type_
    for name, value in told.items():
        setattr(info, name, value)
    return info


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_images_and_labels_by_key_in_the_order_of_the_tar(tmp_path, format):
    long = "f" * 90 + "/" + "k" * 60
    members = {
        "b.png": b"first",
        "b.json": b"{}",
        "b.cls": b"12",
        "a/b.JPG": b"second",
        "a/b.cls": b" 0\n",
        f"{long}.cls": b"3",
        f"{long}.webp": b"third",
        "notes.seg.png": b"not an image of the key: its extension is seg.png",
        "readme": b"",
    }
    index = index_tar(write_tar(tmp_path / "x.tar", members, format=format))
    assert index.count == 3 and index.labels.tolist() == [12, 0, 3]
    assert [index.content(number) for number in range(3)] == [b"first", b"second", b"third"]
    assert index.told(1) == f"{tmp_path / 'x.tar'}: a/b.JPG"


def test_several_tars_follow_each_other(tmp_path):
    files = [write_tar(tmp_path / f"{n}.tar", {f"{k}.png": bytes([n, k]) for k in range(n)}) for n in (2, 0, 3)]
    joined = Index.join([index_tar(file) for file in files])
    assert joined.labels is None
    assert [joined.content(n) for n in range(joined.count)] == [
        bytes(pair) for pair in ((2, 0), (2, 1), (3, 0), (3, 1), (3, 2))
    ]
    every = joined.every(2)
    assert [every.content(n) for n in range(every.count)] == [bytes(pair) for pair in ((2, 0), (3, 0), (3, 2))]
    assert every.told(2) == f"{files[2]}: 2.png"


@pytest.mark.parametrize(
    "name", ["../x.png", "/etc/x.png", "a/../../x.png", "..\\x.png", "C:\\x.png", "c:x.png", "..", "a/.."]
)
def test_names_that_point_outside_are_refused(tmp_path, name):
    write_tar(tmp_path / "x.tar", {"fine.png": b"x", name: b"x"})
    with pytest.raises(ValueError, match=r"x\.tar: '.+' names a place outside of the archive") as error:
        index_tar(tmp_path / "x.tar")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "member",
    [
        kind(tarfile.SYMTYPE, linkname="/etc/passwd"),
        kind(tarfile.LNKTYPE, linkname="fine.png"),
        kind(tarfile.CHRTYPE, devmajor=1, devminor=5),
        kind(tarfile.BLKTYPE),
        kind(tarfile.FIFOTYPE),
    ],
)
def test_links_and_devices_are_refused(tmp_path, member):
    write_tar(tmp_path / "x.tar", {"fine.png": b"x", "odd.png": member})
    with pytest.raises(ValueError, match=r"x\.tar: 'odd\.png' is a link, a device or a sparse file"):
        index_tar(tmp_path / "x.tar")


def test_folders_within_are_harmless(tmp_path):
    write_tar(tmp_path / "x.tar", {"./": kind(tarfile.DIRTYPE), "./a": kind(tarfile.DIRTYPE), "./a/x.png": b"x"})
    assert index_tar(tmp_path / "x.tar").count == 1


@pytest.mark.parametrize(
    "members, message",
    [
        ({"a.png": b"", "a.cls": b"1", "b.png": b""}, "b.png has no label"),
        ({"a.png": b"", "a.jpg": b""}, "a.jpg is a second image beside a.png"),
        ({"a.png": b"", "a.cls": b"cat"}, "a.cls must be a whole number from 0 on, got b'cat'"),
        ({"a.png": b"", "a.cls": b"-1"}, "a.cls must be a whole number"),
        ({"a.png": b"", "a.cls": b"9" * 19}, "a.cls must be a whole number"),
        ({"a.png": b"", "a.cls": b"9" * 5000}, "a.cls must be a whole number"),
    ],
)
def test_labels_and_images_belong_together(tmp_path, members, message):
    with pytest.raises(ValueError, match=rf"x\.tar: {message}"):
        index_tar(write_tar(tmp_path / "x.tar", members))


def test_tars_with_and_without_labels_do_not_mix(tmp_path):
    with_labels = write_tar(tmp_path / "a.tar", {"a.png": b"", "a.cls": b"1"})
    without = write_tar(tmp_path / "b.tar", {"a.png": b""})
    with pytest.raises(ValueError, match=r"b\.tar has no labels"):
        Index.join([index_tar(with_labels), index_tar(without)])


def test_torn_compressed_and_forged_tars_are_refused(tmp_path):
    whole = write_tar(tmp_path / "x.tar", {"a.png": bytes(1000), "b.png": bytes(1000)}).read_bytes()
    for length in (0, 100, 512, 1000, 1536, 1536 + 700, 1536 + 1536):  # within and between members
        (tmp_path / "torn.tar").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"torn\.tar.* is torn"):
            index_tar(tmp_path / "torn.tar")
    (tmp_path / "torn.tar").write_bytes(whole[:1536] + b"garbage" * 200)
    with pytest.raises(ValueError, match=r"torn\.tar is torn \(its end is missing\)"):
        index_tar(tmp_path / "torn.tar")
    write_tar(tmp_path / "packed.tar", {"a.png": b"x"}, mode="w:gz")
    with pytest.raises(ValueError, match=r"packed\.tar is torn, or no uncompressed tar"):
        index_tar(tmp_path / "packed.tar")
    with pytest.raises(ValueError, match=r"none\.tar is torn, or no uncompressed tar \(.*No such file"):
        index_tar(tmp_path / "none.tar")
    huge = kind(tarfile.REGTYPE, size=10**12)
    with tarfile.open(tmp_path / "bomb.tar", "w") as tar:
        huge.name = "a.png"
        tar.fileobj.write(huge.tobuf())
    with pytest.raises(ValueError, match=r"bomb\.tar: 'a\.png' is torn or forged: it tells of more bytes"):
        index_tar(tmp_path / "bomb.tar")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3000), st.binary(min_size=1, max_size=12))
def test_whatever_is_written_over_the_error_is_one_line_or_the_tar_reads(tmp_path_factory, place, garbage):
    file = tmp_path_factory.mktemp("tar") / "x.tar"
    content = bytearray(
        write_tar(file, {"a.png": b"x" * 600, "a.cls": b"1", "b.png": b"y", "b.cls": b"2"}).read_bytes()
    )
    content[place : place + len(garbage)] = garbage
    file.write_bytes(content)
    try:
        index = index_tar(file)
        assert all(len(index.content(n)) == index.places[n, 2] for n in range(index.count))
        assert np.all(index.places >= 0)
    except ValueError as error:
        assert "\n" not in str(error) and str(file) in str(error)
