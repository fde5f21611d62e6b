"""samples.npz: numpy.savez's own bytes, written as images come, whole or not at all."""

import resource
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.samples import read_labels, write_npz


def images(count: int, height: int = 4, width: int = 5) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@settings(max_examples=15)
@given(st.lists(st.integers(0, 7), max_size=5), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_the_bytes_are_those_of_numpy_savez_however_the_images_come(tmp_path_factory, lengths, height, width, labelled):
    folder, x = tmp_path_factory.mktemp("npz"), images(sum(lengths), height, width)
    labels = np.arange(len(x)) % 3 if labelled else None
    blocks = np.split(x, np.cumsum(lengths)[:-1]) if lengths else []
    write_npz(folder / "streamed.npz", len(x), (height, width), iter(blocks), labels)
    np.savez(folder / "savez.npz", arr_0=x, **({"labels": labels} if labelled else {}))
    assert (folder / "streamed.npz").read_bytes() == (folder / "savez.npz").read_bytes()


def test_numpy_reads_it_and_labels_of_any_whole_type_become_int64(tmp_path):
    file, x = tmp_path / "new" / "x.npz", images(6)
    write_npz(file, 6, (4, 5), [x[::-1][:4], np.asfortranarray(x[::-1][4:])], np.arange(6, dtype=np.uint8))
    with np.load(file) as read:
        assert set(read) == {"arr_0", "labels"} and read["labels"].dtype == np.int64
        np.testing.assert_array_equal(read["arr_0"], x[::-1])
    assert not zipfile.ZipFile(file).testzip() and [item.name for item in file.parent.iterdir()] == ["x.npz"]


@pytest.mark.parametrize("given_, message", [(5, "5 of 6 images"), (7, "more than 6 images")])
def test_another_count_than_was_said_leaves_what_was_there(tmp_path, given_, message):
    file = tmp_path / "x.npz"
    file.write_bytes(b"before")
    with pytest.raises(AssertionError, match=message):
        write_npz(file, 6, (4, 5), images(given_)[:, None], None)
    assert file.read_bytes() == b"before" and [item.name for item in tmp_path.iterdir()] == ["x.npz"]


@pytest.mark.parametrize("block", [images(3).astype(np.float32), images(3, 5, 4), images(3)[..., :1]])
def test_a_block_of_another_form_is_a_bug(tmp_path, block):
    with pytest.raises(AssertionError):
        write_npz(tmp_path / "x.npz", 3, (4, 5), [block])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError):
            write_npz(tmp_path / "x.npz", 64, (32, 32), (images(8, 32, 32) for _ in range(8)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_an_interruption_leaves_nothing(tmp_path):
    def blocks():
        yield images(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_npz(tmp_path / "x.npz", 6, (4, 5), blocks())
    assert not list(tmp_path.iterdir())


def test_memory_is_that_of_one_block(tmp_path):
    tracemalloc.start()
    write_npz(tmp_path / "x.npz", 320, (64, 64), (images(10, 64, 64) for _ in range(32)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "x.npz").stat().st_size > 320 * 64 * 64 * 3 > 5 * peak


def test_labels_are_read_under_either_name_and_without_the_images(tmp_path):
    labels = np.array([3, 1, 2], np.int32)
    np.savez(tmp_path / "ours.npz", arr_0=images(3), labels=labels)
    np.savez(tmp_path / "adm.npz", images(3), labels)
    np.savez(tmp_path / "none.npz", images(3))
    np.savez(tmp_path / "other.npz", images(3), np.zeros((2, 2)))
    write_npz(tmp_path / "classless.npz", 3, (4, 5), [images(3)], np.full(3, -1))
    for name in ("ours", "adm"):
        read = read_labels(tmp_path / f"{name}.npz")
        assert read.dtype == np.int64 and read.tolist() == [3, 1, 2]
    for name in ("none", "other", "classless"):
        assert read_labels(tmp_path / f"{name}.npz") is None


@pytest.mark.parametrize("labels", [np.arange(4), np.zeros(3), np.array(["a", "b", "c"]), np.zeros(3, object)])
def test_labels_that_do_not_fit_are_refused(tmp_path, labels):
    np.savez(tmp_path / "x.npz", arr_0=images(3), labels=labels)
    with pytest.raises(ValueError, match=r"x\.npz: labels must be whole numbers, one for each of the 3 images, got"):
        read_labels(tmp_path / "x.npz")


@pytest.mark.slow
def test_more_than_four_gib(tmp_path):
    count = 5700  # x 512 x 512 x 3 = 4.2 GiB: beyond what a zip without its 64-bit extension can tell
    block = images(100, 512, 512)
    write_npz(tmp_path / "x.npz", count, (512, 512), (block for _ in range(count // 100)), np.arange(count))
    from dit.imagesets import open_images

    found = open_images(tmp_path / "x.npz")
    np.testing.assert_array_equal(found.read(count - 2, count), block[-2:])
    assert found.labels[-1] == count - 1
