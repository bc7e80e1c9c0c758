"""Inputs and matrices that the tests of several methods share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lorgnette.quantize.inputs import LayerInputs

Matrix = NDArray[np.float32]


def layer_inputs(rows: Matrix) -> LayerInputs:
    """What calibration would have seen of some positions."""
    exact = rows.astype(np.float64)
    return LayerInputs(
        count=len(rows),
        second_moment=(exact.T @ exact / len(rows)).astype(np.float32),
        mean_size=np.abs(rows).mean(axis=0),
        largest=np.abs(rows).max(axis=0),
        lowest=float(rows.min()),
        highest=float(rows.max()),
        rows=rows[:512],
    )


def correlated(count: int, columns: int, seed: int = 0) -> Matrix:
    """Positions whose channels share a few causes, as those of trained models do."""
    draw = np.random.default_rng(seed)
    causes = draw.standard_normal((count, max(2, columns // 4)))
    spread = draw.standard_normal((causes.shape[1], columns))
    noise = 0.3 * draw.standard_normal((count, columns))
    rows: Matrix = (causes @ spread / np.sqrt(len(spread)) + noise).astype(np.float32)
    return rows


def trained_like(rows: int = 64, columns: int = 128, seed: int = 3) -> Matrix:
    """Normal weights with a few outliers."""
    draw = np.random.default_rng(seed)
    weight = draw.standard_normal((rows, columns)) * 0.02
    weight[draw.random(weight.shape) < 0.005] *= 12
    return weight.astype(np.float32)
