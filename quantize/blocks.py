"""What the methods share: a matrix is worked on in blocks of rows, so that memory stays bounded."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lorgnette.errors import ConfigError
from lorgnette.quantize.scheme import QuantScheme, QuantTensor, grouped

BLOCK_ELEMENTS = 1 << 16
"""Weights worked on at a time: a few arrays of so many fit a core's cache, where they are
several times faster than in memory."""

Groups = NDArray[np.float32]
"""float32 `[rows, groups, group_size]`."""
Rounded = tuple[Groups, NDArray[np.float32], NDArray[np.float32]]
"""Codes of groups, their scales and their zero points, all float32, codes and zero points whole."""


def by_rows(
    weight: NDArray[np.float32], scheme: QuantScheme, method: Callable[[Groups], Rounded]
) -> QuantTensor:
    """Applies a method to a matrix, some rows at a time.

    Args:
        weight: float32 `[rows, columns]`.
        scheme: What is wanted.
        method: Groups of some rows to what becomes of them. Of a scheme for the whole matrix it
            sees one group, which is the matrix.

    Raises:
        ConfigError: The scheme is a palette.
    """
    rows, columns = weight.shape
    if scheme.palette:
        raise ConfigError(
            "codes of a palette are no multiples of a step",
            got=scheme.form,
            hint="use the method 'kmeans'",
        )
    if scheme.per_tensor:
        return _whole(weight, scheme, method)
    codes = np.empty((rows, scheme.padded(columns)), np.uint8)
    scales = np.empty((rows, scheme.groups(columns)), np.float32)
    zeros = np.empty(scales.shape, np.uint8)
    step = max(1, BLOCK_ELEMENTS // max(columns, 1))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        made = method(grouped(weight[part], scheme.group_size))
        codes[part] = made[0].reshape(len(made[0]), -1)
        scales[part], zeros[part] = made[1], made[2]
    return QuantTensor(codes, scales, zeros, columns, scheme)


def _whole(
    weight: NDArray[np.float32], scheme: QuantScheme, method: Callable[[Groups], Rounded]
) -> QuantTensor:
    codes, scale, zero = method(weight.reshape(1, 1, -1))
    rows, columns = weight.shape
    return QuantTensor(
        codes.astype(np.uint8).reshape(rows, columns),
        np.full((rows, 1), scale.item(), np.float32),
        np.full((rows, 1), zero.item(), np.uint8),
        columns,
        scheme,
    )
