"""Many small pictures as one."""

import numpy as np


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """uint8 images (N, H, W, 3) side by side, row by row, one pixel of white between them."""
    rows = -(-len(images) // columns)
    H, W = images.shape[1:3]
    sheet = np.full((rows * (H + 1) - 1, columns * (W + 1) - 1, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (H + 1), i % columns * (W + 1)
        sheet[top : top + H, left : left + W] = image
    return sheet


def shown(labels: np.ndarray, num_classes: int = 10, per_class: int = 10) -> np.ndarray:
    """The indices, in order, of the few images that `overview` shows of those with these labels (N,)."""
    classes = np.unique(labels)[:num_classes]
    if len(classes) == 1:
        return np.arange(min(len(labels), per_class * num_classes))
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in classes]))


def overview(images: np.ndarray, labels: np.ndarray, num_classes: int = 10, per_class: int = 10) -> np.ndarray:
    """A grid with a row for each of the first classes; the first images where there are no classes."""
    rows = [np.flatnonzero(labels == label)[:per_class] for label in np.unique(labels)[:num_classes]]
    if len(rows) == 1:
        return grid(images[: per_class * num_classes], per_class)
    blank = np.full_like(images[0], 255)
    cells = [[*images[row], *[blank] * (per_class - len(row))] for row in rows]
    return grid(np.stack([cell for row in cells for cell in row]), per_class)
