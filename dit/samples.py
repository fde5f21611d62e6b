"""samples.npz, the form in which ADM's evaluator and everyone after it take generated images.

`arr_0` uint8 (N, H, W, 3) and `labels` int64 (N,), uncompressed. It is written as the images come, so that 50,000 of
512 x 512 (40 GB) need the memory of one block; the bytes are those that numpy.savez would have written.
"""

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

from dit.arrays import Member, open_npz
from dit.paths import replacing

IMAGES = "arr_0"
LABELS = ("labels", "arr_1")  # ours, and what `numpy.savez(file, images, labels)` makes, as ADM's own sampler does


def write_npz(
    path: Path, count: int, size: tuple[int, int], blocks: Iterable[np.ndarray], labels: np.ndarray | None = None
) -> None:
    """Write `count` images of `size` (H, W), which come as blocks uint8 (n, H, W, 3), and their labels (count,).

    Equal images and labels give equal bytes. The file is there once it is whole; an error leaves what was there before.
    More or fewer images than `count` are an AssertionError.
    """
    shape = (count, *size, 3)
    assert labels is None or np.shape(labels) == (count,), f"labels {np.shape(labels)} for {count} images"
    with replacing(path) as unfinished, zipfile.ZipFile(unfinished, "w", allowZip64=True) as archive:
        with archive.open(f"{IMAGES}.npy", "w", force_zip64=True) as member:
            _write_header(member, np.dtype(np.uint8), shape)
            written = 0
            for block in blocks:
                assert block.dtype == np.uint8 and block.shape[1:] == shape[1:], (block.dtype, block.shape, shape)
                written += len(block)
                assert written <= count, f"more than {count} images"
                member.write(np.ascontiguousarray(block).data)
            assert written == count, f"{written} of {count} images"
        if labels is not None:
            labels = np.ascontiguousarray(labels, np.int64)
            with archive.open(f"{LABELS[0]}.npy", "w", force_zip64=True) as member:
                _write_header(member, labels.dtype, labels.shape)
                member.write(labels.data)


def read_labels(path: Path) -> np.ndarray | None:
    """The labels int64 (N,) of an .npz of images, whose images are not read; None where it has none.

    Labels that are all negative (a model without classes) count as none. Raises ValueError where the file is damaged.
    """
    return labels_of(open_npz(path))


def labels_of(members: dict[str, Member]) -> np.ndarray | None:
    """`read_labels` of an .npz that is open already."""
    count = members[IMAGES].shape[0] if IMAGES in members and members[IMAGES].shape else None
    for name in LABELS:
        if (member := members.get(name)) is None:
            continue
        if member.dtype.kind in "iu" and len(member.shape) == 1 and count in (None, member.shape[0]):
            labels = member.load().astype(np.int64)
            return None if np.all(labels < 0) else labels
        if name == LABELS[0]:
            raise ValueError(
                f"{member.told} must be whole numbers, one for each of the {count} images, "
                f"got {member.dtype} {member.shape}: save numpy.int64"
            )
    return None


def _write_header(member: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(
        member, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
