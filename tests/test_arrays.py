"""Arrays of other people's files: NumPy reads the same; torn, forged and pickled ones are refused in one line."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.arrays import open_npy, open_npz

X = np.random.default_rng(0).integers(0, 256, (11, 6, 5, 3), dtype=np.uint8)
SAVES = {"stored": np.savez, "compressed": np.savez_compressed}


def header(shape: tuple[int, ...], descr: str = "|u1") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def forge(path: Path, content: bytes, compression: int = zipfile.ZIP_DEFLATED, **told) -> Path:
    """An .npz whose directory tells of the one member what is `told`."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("arr_0.npy", content)
        for name, value in told.items():
            setattr(archive.filelist[0], name, value)
    return path


@settings(max_examples=20)
@given(st.sampled_from(sorted(SAVES)), st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=5))
def test_any_rows_in_any_order(tmp_path_factory, how, spans):
    file = tmp_path_factory.mktemp("npz") / "x.npz"
    SAVES[how](file, images=X, statistics=np.arange(6.0).reshape(2, 3))
    members = open_npz(file)
    for start, stop in map(sorted, spans):
        rows = members["images"].rows(start, stop)
        np.testing.assert_array_equal(rows, X[start:stop])
        assert rows.flags.writeable and rows.dtype == np.uint8
    np.testing.assert_array_equal(members["statistics"].load(), np.arange(6.0).reshape(2, 3))
    assert b"".join(members["images"].pieces()) == X.tobytes()


def test_npy_and_arrays_that_lie_column_by_column(tmp_path):
    values = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    np.save(tmp_path / "x.npy", X)
    np.savez(tmp_path / "x.npz", values=values, scalar=np.float32(3))
    np.testing.assert_array_equal(open_npy(tmp_path / "x.npy").rows(2, 5), X[2:5])
    assert b"".join(open_npy(tmp_path / "x.npy").pieces()) == X.tobytes()
    members = open_npz(tmp_path / "x.npz")
    np.testing.assert_array_equal(members["values"].load(), values)
    assert members["values"].fortran and members["scalar"].load() == 3


def test_nothing_is_unpickled(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=np.array([{}, {}]))
    member = open_npz(tmp_path / "x.npz")["arr_0"]
    with pytest.raises(ValueError, match=r"x\.npz: arr_0 holds Python objects, which could run any program"):
        member.load()


@pytest.mark.parametrize("how", SAVES)
def test_a_file_cut_anywhere_is_refused(tmp_path, how):
    SAVES[how](tmp_path / "whole.npz", X)
    content = (tmp_path / "whole.npz").read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 1):
        (tmp_path / "torn.npz").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"torn\.npz is torn, or no file of NumPy's"):
            open_npz(tmp_path / "torn.npz")
    np.save(tmp_path / "x.npy", X)
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"x\.npy is torn or forged: its header tells of 990 bytes, 989 are there"):
        open_npy(tmp_path / "x.npy")


def test_what_claims_more_than_it_holds_is_refused(tmp_path):
    huge = header((10**6, 512, 512, 3))
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with pytest.raises(
            ValueError, match=r"arr_0 is torn or forged: its header tells of 786432000000 bytes, 99 are"
        ):
            open_npz(forge(tmp_path / "x.npz", huge + bytes(99), compression))
    with pytest.raises(ValueError, match="arr_0 is torn or forged"):  # and the directory vouches for it
        open_npz(forge(tmp_path / "x.npz", huge + bytes(99), file_size=10**12))
    with pytest.raises(ValueError, match="arr_0 is torn or forged"):
        open_npz(forge(tmp_path / "x.npz", huge + bytes(99), zipfile.ZIP_STORED, file_size=10**12))
    small = forge(tmp_path / "y.npz", header((2000, 3)) + bytes(99), file_size=128 + 6000)  # not above what deflate can
    with pytest.raises(ValueError, match="y.npz: arr_0 is torn"):
        open_npz(small)["arr_0"].load()


@pytest.mark.parametrize(
    "content, told, message",
    [
        (b"no header", {}, "is torn, or no file of NumPy's"),
        (header((3, -1)), {}, "is torn, or no file of NumPy's"),
        (b"\x93NUMPY\x03\x00" + bytes(99), {}, "is torn, or no file of NumPy's"),
        (header((3,)) + bytes(3), {"flag_bits": 1}, "is encrypted"),
    ],
)
def test_odd_members_are_refused(tmp_path, content, told, message):
    with pytest.raises(ValueError, match=rf"x\.npz: arr_0 {message}"):
        open_npz(forge(tmp_path / "x.npz", content, **told))
    with pytest.raises(ValueError, match="compressed in a way that NumPy does not write"):
        open_npz(forge(tmp_path / "x.npz", content, zipfile.ZIP_LZMA))


def test_a_flipped_bit_is_found_by_the_checksum(tmp_path):
    np.savez(tmp_path / "x.npz", X)
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.npz.* is torn.*CRC"):
        list(open_npz(tmp_path / "x.npz")["arr_0"].pieces())


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(SAVES)), st.floats(0, 1), st.binary(min_size=1, max_size=8))
def test_whatever_is_written_over_the_error_is_one_line_or_the_file_reads(tmp_path_factory, how, where, garbage):
    file = tmp_path_factory.mktemp("npz") / "x.npz"
    SAVES[how](file, arr_0=X[:2], labels=np.arange(2))
    content = bytearray(file.read_bytes())
    place = int(where * len(content))
    content[place : place + len(garbage)] = garbage
    file.write_bytes(content)
    try:
        for member in open_npz(file).values():
            if member.shape and not member.fortran:
                member.rows(0, member.shape[0])
            list(member.pieces())
    except ValueError as error:
        assert "\n" not in str(error) and str(file) in str(error)
