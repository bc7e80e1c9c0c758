"""Round to nearest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lorgnette.quantize.scheme import QuantScheme, QuantTensor, grouped


def quantize(weight: NDArray[np.float32], scheme: QuantScheme) -> QuantTensor:
    """Rounds each group of a matrix to its nearest codes.

    The element of largest magnitude in a group maps to the code of largest magnitude, which is
    negative: with m that element (the positive one of two alike), scale = m / -2**(bits-1), so
    all 2**bits codes are in use. A group of zeros has scale 0 and stays zero.

    Shapes: `weight` float32 `[rows, columns]`.
    Source: the symmetric block format of ggml (Q4_0), as also used by ONNX MatMulNBits.
    """
    rows, columns = weight.shape
    half = 1 << (scheme.bits - 1)
    groups = grouped(weight, scheme.group_size)
    highest, lowest = groups.max(axis=2), groups.min(axis=2)
    scales = np.where(highest >= -lowest, highest, lowest) / np.float32(-half)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scales
    # A scale of zero, or so small that its inverse overflows: zero for all purposes.
    inverse[~np.isfinite(inverse)] = 0
    codes = groups * inverse[:, :, None]
    np.rint(codes, out=codes)
    codes += half
    np.clip(codes, 0, 2 * half - 1, out=codes)
    middles = np.full(scales.shape, half, np.uint8)
    return QuantTensor(codes.astype(np.uint8).reshape(rows, -1), scales, middles, columns, scheme)
