"""Half-quadratic quantisation: few large errors matter less than many small ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lorgnette.quantize.blocks import Groups, Rounded, by_rows
from lorgnette.quantize.inputs import LayerInputs
from lorgnette.quantize.methods import rtn
from lorgnette.quantize.scheme import QuantScheme, QuantTensor

ROUNDS = 8
BETA = 10.0
"""Weight of the quadratic term at first; the authors' value."""
KAPPA = 1.01
"""How it grows each round; the authors' value."""


NEEDS_INPUTS = False


def quantize(
    weight: NDArray[np.float32], scheme: QuantScheme, inputs: LayerInputs | None = None
) -> QuantTensor:
    """Lowers sum(sqrt(abs(error))) of each group, which lets outliers go, from round to nearest.

    Rounds of two steps. Errors e are split into a sparse part that is given up, by the shrinkage
    of the p-norm with p = 1/2, t = sign(e) * max(abs(e) - abs(e)**(p-1) / beta, 0), and the rest.
    Then the scale is that of least squares on w - t with the codes q (less the zero point) held,
    s = <w - t, q> / <q, q>, and the codes are the nearest again. A group keeps the best that it
    has met.

    The authors solve the zero point and hold the scale; here it is the other way about. Zero
    points are whole codes, because engines gather and multiply with such, and the zero points
    solved for, once rounded, were those of round to nearest in every group of the zoo. Errors are
    measured in steps instead of the weights' own units, so that one beta suits every layer.

    Shapes: `weight` float32 `[rows, columns]`.
    Source: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models",
    https://mobiusml.github.io/hqq_blog/.
    """
    del inputs
    return by_rows(weight, scheme, lambda groups: _improved(groups, scheme))


def _improved(groups: Groups, scheme: QuantScheme) -> Rounded:
    plain = rtn.rounded(groups, scheme)
    codes, steps, zeros = plain
    units = groups * rtn.inverse(steps)[:, :, None]
    less = codes - zeros[:, :, None]
    best, best_scales = less.copy(), np.ones_like(steps)
    off = units - less
    least = objective(off)
    scales, beta = best_scales, np.float32(BETA)
    low, high = (np.float32(end) - zeros[:, :, None] for end in (scheme.first, scheme.last))
    for _ in range(ROUNDS):
        scales = _solve(units - shrink(off, beta), less, scales)
        np.multiply(units, rtn.inverse(scales)[:, :, None], out=less)
        np.rint(less, out=less)
        np.clip(less, low, high, out=less)
        off = units - less * scales[:, :, None]
        cost = objective(off)
        better = cost < least
        least = np.where(better, cost, least)
        best[better] = less[better]
        best_scales = np.where(better, scales, best_scales)
        beta *= np.float32(KAPPA)
    made = best + zeros[:, :, None], best_scales * steps, zeros
    return rtn.recoded(groups, rtn.unless_too_large(made, plain, scheme), scheme)


def objective(off: Groups) -> NDArray[np.float32]:
    """What is lowered: the sum of the roots of each group's errors."""
    total: NDArray[np.float32] = np.sqrt(np.abs(off)).sum(axis=2)
    return total


def shrink(off: Groups, beta: np.float32) -> Groups:
    """The part of errors that is given up: the shrinkage of the p-norm with p = 1/2."""
    size = np.abs(off)
    # An error of zero has no shrinkage: it stays zero.
    size -= 1 / (beta * np.sqrt(np.maximum(size, np.float32(1e-12))))
    return np.copysign(np.maximum(size, 0), off)


def _solve(target: Groups, codes: Groups, scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """The scale of least squares with the codes held; the old one where there is none."""
    along = np.einsum("rgs,rgs->rg", target, codes)
    square = np.einsum("rgs,rgs->rg", codes, codes)
    solved = scales.copy()
    np.divide(along, square, out=solved, where=(square > 0) & (along > 0))
    return solved
