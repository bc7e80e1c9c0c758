"""A slow and plain oracle for the methods, one number at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def rtn_group(group: NDArray[np.float32], bits: int) -> tuple[list[int], np.float32]:
    """Codes and scale of one group by round to nearest, in scalar arithmetic.

    Returns:
        The codes, 0 .. 2**bits - 1, and the scale.
    """
    half = 2 ** (bits - 1)
    extreme = max(group, key=lambda value: (abs(float(value)), float(value)))
    scale = np.float32(extreme) / np.float32(-half)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale
    if not np.isfinite(inverse):
        return [half] * len(group), scale
    codes = [round(float(np.float32(value) * inverse)) + half for value in group]
    return [min(max(code, 0), 2 * half - 1) for code in codes], scale
