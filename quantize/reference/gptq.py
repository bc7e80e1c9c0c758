"""GPTQ by the plain loop over columns, with an inverse that is updated as columns go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class RoundedRow(NamedTuple):
    """What becomes of one row."""

    codes: list[int]
    margin: float
    """How near, in steps, any weight came to lie halfway between two codes: below about 1e-4
    another order of operations may round it the other way."""


def gptq_row(
    row: Sequence[float],
    moment: NDArray[np.float64],
    order: Sequence[int],
    bits: int,
    step: Callable[[int, list[float]], tuple[float, int]],
) -> RoundedRow:
    """Codes of one row.

    After each column the others are moved by the least that keeps the squared error of the
    outputs lowest, `-(w_j - q_j) / Inv_jj * Inv_j`, and the column is eliminated from the inverse:
    `Inv -= Inv_j InvT_j / Inv_jj`.

    Args:
        row: The weights.
        moment: The damped second moment of the inputs.
        order: The columns as they are rounded.
        bits: Of a code.
        step: Scale and zero point for a column, from its number and all weights as they are now.

    Source: Frantar and Alistarh 2022, "Optimal Brain Compression", arXiv 2208.11580, equations 3
    and 4, in the order of GPTQ, arXiv 2210.17323.
    """
    weights = [float(value) for value in row]
    inverse = np.asarray(np.linalg.inv(moment), np.float64)
    codes, margin, left = [0] * len(weights), 0.5, list(order)
    while left:
        column = left[0]
        scale, zero = step(column, weights)
        exact = weights[column] / scale if scale else 0.0
        code = min(max(round(exact) + zero, 0), 2**bits - 1)
        if -zero - 0.5 < exact < 2**bits - 0.5 - zero:
            margin = min(margin, abs(exact % 1 - 0.5))
        codes[column] = code
        error = (weights[column] - (code - zero) * scale) / float(inverse[column, column])
        left.pop(0)
        for other in left:
            weights[other] -= error * float(inverse[column, other])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return RoundedRow(codes, margin)


class RefinedRow(NamedTuple):
    """What becomes of one row that was rounded before."""

    codes: list[int]
    scales: list[float]
    margin: float
    """As of `RoundedRow`."""


def refined_row(
    row: Sequence[float],
    codes: Sequence[int],
    steps: Sequence[tuple[float, int]],
    moment: NDArray[np.float64],
    bits: int,
    block: int,
) -> RefinedRow:
    """Each code of a block in turn the best with all others held, then each of its scales.

    Every error is worked out anew each time: the best real value of column j is that at which the
    derivative of E H E^T vanishes, and so is the best scale of a group.

    Args:
        row: The weights.
        codes: Their codes.
        steps: Scale and zero point of each group.
        moment: The second moment of the inputs.
        bits: Of a code.
        block: Columns that are visited before their scales are.
    """
    new, scales, margin = list(codes), [scale for scale, _ in steps], 0.5
    zeros = [zero for _, zero in steps]
    size = len(new) // len(steps)

    def pull(column: int) -> float:
        made = [(code - zeros[k // size]) * scales[k // size] for k, code in enumerate(new)]
        pairs = zip(row, made, strict=True)
        return sum((w - q) * float(moment[k, column]) for k, (w, q) in enumerate(pairs))

    for first in range(0, len(new), block):
        columns = range(first, min(first + block, len(new)))
        for column in columns:
            scale, zero = scales[column // size], zeros[column // size]
            own = float(moment[column, column])
            exact = (new[column] - zero) + (pull(column) / own / scale if own and scale else 0.0)
            if -zero - 0.5 < exact < 2**bits - 0.5 - zero:
                margin = min(margin, abs(exact % 1 - 0.5))
            new[column] = min(max(round(exact) + zero, 0), 2**bits - 1) if scale else zero
        for group in range(first // size, columns.stop // size):
            own_columns = range(group * size, group * size + size)
            less = [new[column] - zeros[group] for column in own_columns]
            along = sum(c * pull(column) for c, column in zip(less, own_columns, strict=True))
            part = moment[
                own_columns.start : own_columns.stop, own_columns.start : own_columns.stop
            ]
            square = sum(
                a * b * float(part[i, j]) for i, a in enumerate(less) for j, b in enumerate(less)
            )
            scales[group] += along / square if square > 0 else 0.0
    return RefinedRow(new, scales, margin)


def damped(moment: NDArray[np.float32], share: float) -> NDArray[np.float64]:
    """A second moment with a share of its diagonal added, ones where there is none."""
    exact: NDArray[np.float64] = moment.astype(np.float64)
    for at in range(len(exact)):
        exact[at, at] = exact[at, at] * (1 + share) if exact[at, at] > 0 else 1.0
    return exact


def output_error(
    weight: NDArray[np.float32], back: NDArray[np.float32], moment: NDArray[np.float32]
) -> float:
    """tr(E H E^T): the mean squared error of the outputs, summed over them."""
    off = weight.astype(np.float64) - back
    return float(np.sum((off @ moment.astype(np.float64)) * off))
