"""Round to nearest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lorgnette.quantize.scheme import QuantScheme, QuantTensor, grouped


def quantize(weight: NDArray[np.float32], scheme: QuantScheme) -> QuantTensor:
    """Rounds each group of a matrix to its nearest codes.

    The element of largest magnitude in a group maps to the code of largest magnitude, which is
    negative: with m that element, scale = m / -2**(bits-1), so all 2**bits codes are in use. A
    group of zeros has scale 0 and stays zero.

    Shapes: `weight` float32 `[rows, columns]`.
    Source: the symmetric block format of ggml (Q4_0), as also used by ONNX MatMulNBits.
    """
    rows, columns = weight.shape
    half = 1 << (scheme.bits - 1)
    groups = grouped(weight, scheme.group_size)
    at = np.abs(groups).argmax(axis=2, keepdims=True)
    extreme = np.take_along_axis(groups, at, axis=2)
    scales = extreme / np.float32(-half)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    # A scale so small that its inverse overflows belongs to a group that is zero for all purposes.
    inverse[~np.isfinite(inverse)] = 0
    codes = np.clip(np.rint(groups * inverse) + half, 0, 2 * half - 1).astype(np.uint8)
    return QuantTensor(
        codes.reshape(rows, -1), np.ascontiguousarray(scales[:, :, 0]), columns, half, scheme
    )
