"""How activations are rounded to 8 bits, as the engines do it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lorgnette.quantize.inputs import LayerInputs
from lorgnette.quantize.scheme import InputRange, QuantScheme, grouped

Array = NDArray[np.float32]
LAST = 255
"""The last code of static activations."""


def round_inputs(rows: Array, scheme: QuantScheme) -> Array:
    """Positions `[R, C]` as a scheme with scales found at run time rounds them.

    Static activations are left alone: their range depends on what is yet to be chosen.
    """
    if scheme.activations not in ("int8_group", "int8_token"):
        return rows
    width = scheme.group_size if scheme.activations == "int8_group" else 0
    groups = grouped(rows, width)
    scales = np.abs(groups).max(axis=2, keepdims=True) / np.float32(127)
    safe = np.where(scales > 0, scales, np.float32(1))
    rounded: Array = (np.rint(groups / safe) * scales).reshape(len(rows), -1)
    return rounded[:, : rows.shape[1]]


def input_range(inputs: LayerInputs) -> InputRange:
    """One range for all positions: from the least to the greatest seen, 0 among them.

    Source: Jacob et al. 2018, arXiv 1712.05877, section 2.1 (asymmetric, unsigned).
    """
    lowest, highest = min(inputs.lowest, 0.0), max(inputs.highest, 0.0)
    scale = max((highest - lowest) / LAST, float(np.finfo(np.float32).tiny))
    return InputRange(scale=float(np.float32(scale)), zero_point=round(-lowest / scale))
