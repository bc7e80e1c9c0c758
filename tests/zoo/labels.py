"""What each patch of a picture shows, for the warm-up's loss."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tests.zoo.draw import CHARACTERS, COLOURS, SHAPES, Box, Scene

KINDS = ("shape", "colour", "character", "middle", "row", "column")
"""`middle` marks the patch with the centre of a shape. Row and column are those of the patch:
features that say only what is there make the decoder mix up sides and the order of characters."""


def classes(kind: str, side: int) -> int:
    """Number of classes of a kind of label, for pictures of side x side patches."""
    counts = {
        "shape": len(SHAPES) + 1,
        "colour": len(COLOURS) + 1,
        "character": len(CHARACTERS) + 1,
        "middle": 2,
    }
    return counts.get(kind, side)


def label_grid(scene: Scene, box: Box, rows: int, columns: int) -> NDArray[np.int64]:
    """Labels of the first four kinds on a grid laid over part of a picture; 0 is nothing.

    Args:
        scene: The picture.
        box: What the grid covers, in picture pixels; it may reach beyond the picture.
        rows: Rows of the grid.
        columns: Columns of the grid.

    Shapes:
        returns: [rows, columns, 4].
    """
    labels = np.zeros((rows, columns, 4), np.int64)
    sx, sy = columns / (box[2] - box[0]), rows / (box[3] - box[1])
    xs = box[0] + (np.arange(columns) + 0.5) / sx
    ys = box[1] + (np.arange(rows) + 0.5) / sy
    for item in scene.shapes:
        left, top, right, bottom = item.box
        inside = np.ix_((ys > top) & (ys < bottom), (xs > left) & (xs < right))
        labels[..., 0][inside] = SHAPES.index(item.shape) + 1
        labels[..., 1][inside] = list(COLOURS).index(item.colour) + 1
        x, y = item.centre
        labels[int((y - box[1]) * sy), int((x - box[0]) * sx), 3] = 1
    for text in scene.texts:
        for (x, y), character in zip(text.characters, text.text, strict=True):
            row, column = int((y - box[1]) * sy), int((x - box[0]) * sx)
            labels[row, column, 2] = CHARACTERS.index(character) + 1
    return labels


def with_places(labels: NDArray[np.int64], kinds: tuple[str, ...]) -> NDArray[np.int64]:
    """Rows and columns added to labels of square pictures, then `kinds` picked.

    Shapes:
        labels: [G, side, side, 4]. returns: [G, side, side, len(kinds)].
    """
    side = labels.shape[1]
    place = np.broadcast_to(np.indices((side, side)).transpose(1, 2, 0), (*labels.shape[:3], 2))
    return np.concatenate([labels, place], -1)[..., [KINDS.index(kind) for kind in kinds]]


def by_block(labels: NDArray[np.int64], scale: int) -> NDArray[np.int64]:
    """Patches gathered to the image tokens of a pixel shuffle.

    Shapes:
        labels: [G, side, side, L]. returns: [G, N, scale * scale, L].
    """
    count, side = labels.shape[:2]
    x = labels.reshape(count, side // scale, scale, side // scale, scale, -1).swapaxes(2, 3)
    return x.reshape(count, (side // scale) ** 2, scale * scale, -1)
