"""Round to nearest with the step of least squared error."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lorgnette.quantize.blocks import Groups, Rounded, by_rows
from lorgnette.quantize.inputs import LayerInputs
from lorgnette.quantize.methods import rtn
from lorgnette.quantize.scheme import QuantScheme, QuantTensor

SEARCHED = {2: (0.4, 1.16), 3: (0.5, 1.16), 4: (0.65, 1.16), 8: (0.95, 1.01)}
"""The shortest and the longest step tried by bits, as shares of round to nearest's. 1.16 is for
symmetric grids: the largest element then maps to the code before the last of 4 bits."""
CANDIDATES = 10
"""Measured on the zoo: twice as many take a further 0.1 % off the error of 4 bits."""


NEEDS_INPUTS = False


def quantize(
    weight: NDArray[np.float32], scheme: QuantScheme, inputs: LayerInputs | None = None
) -> QuantTensor:
    """Rounds each group with the step, of some shorter and longer ones, of least squared error.

    A shorter step clips the largest weights and rounds all others finer. For each step the codes
    q (less the zero point) are those nearest, and the scale that suits these codes best follows by
    least squares: s = <w, q> / <q, q>, with the error <w, w> - <w, q>**2 / <q, q>. The best
    step's codes are then rounded once more with that scale. Asymmetric groups also try the zero
    points beside. No group comes out worse than by round to nearest: where the search finds
    nothing better, that remains.

    Shapes: `weight` float32 `[rows, columns]`.
    Source: Choukroun et al. 2019, "Low-bit Quantization of Neural Networks for Efficient
    Inference", arXiv 1902.06822, equations 2 and 3 (steps of least squared error by search).
    """
    del inputs
    return by_rows(weight, scheme, lambda groups: searched(groups, scheme))


def searched(
    groups: Groups, scheme: QuantScheme, weights: NDArray[np.float32] | None = None
) -> Rounded:
    """Rounds groups `[rows, groups, group_size]` with the best steps; see `quantize`.

    Args:
        groups: What is rounded.
        scheme: What is wanted.
        weights: How much the squared error of each place of a group counts, `[group_size]`, above
            0 and not all too small; alike if left out.
    """
    plain = rtn.rounded(groups, scheme)
    # In units of round to nearest's step nothing can overflow.
    units = groups * rtn.inverse(plain[1])[:, :, None]
    stretch, zeros = _best(units, plain[2], scheme, weights)
    found = _fit(units, stretch, zeros, scheme, weights)
    before = plain[0], np.ones_like(plain[1]), plain[2]
    better = _errors(units, found, weights) < _errors(units, before, weights)
    chosen = (
        np.where(better[:, :, None], found[0], plain[0]),
        np.where(better, found[1] * plain[1], plain[1]),
        np.where(better, found[2], plain[2]),
    )
    chosen = rtn.unless_too_large(chosen, plain, scheme)
    if scheme.scale_bits == 32:
        return chosen
    return _better(groups, rtn.recoded(groups, chosen, scheme), plain, scheme, weights)


def _better(
    groups: Groups,
    found: Rounded,
    plain: Rounded,
    scheme: QuantScheme,
    weights: NDArray[np.float32] | None,
) -> Rounded:
    """Of two results the better one of each group, or of each row whose scales share a number."""
    with np.errstate(over="ignore", invalid="ignore"):  # infinite errors are no better
        errors = [_errors(groups, made, weights) for made in (found, plain)]
    if scheme.scale_bits == 8:
        errors = [np.repeat(e.sum(axis=1, keepdims=True), e.shape[1], axis=1) for e in errors]
    better = errors[0] < errors[1]
    return (
        np.where(better[:, :, None], found[0], plain[0]),
        np.where(better, found[1], plain[1]),
        np.where(better, found[2], plain[2]),
    )


def _best(
    units: Groups,
    zeros: NDArray[np.float32],
    scheme: QuantScheme,
    weights: NDArray[np.float32] | None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The stretch and the zero point of each group whose codes explain most of it."""
    most = np.zeros_like(zeros)
    best_stretch, best_zeros = np.ones_like(zeros), zeros.copy()
    codes = np.empty_like(units)

    def attempt(stretch: NDArray[np.float32], zeros: NDArray[np.float32]) -> None:
        np.multiply(units, stretch[:, :, None], out=codes)
        _to_codes(codes, zeros, scheme)
        gain = _explained(units, codes, weights)
        better = gain > most
        most[better] = gain[better]
        best_stretch[better] = stretch[better]
        best_zeros[better] = zeros[better]

    for step in np.linspace(*SEARCHED[scheme.bits], CANDIDATES, dtype=np.float32):
        attempt(np.full_like(zeros, 1 / step), zeros)
    if not scheme.symmetric:
        for beside in (-1, 1):
            attempt(best_stretch.copy(), np.clip(zeros + np.float32(beside), 0, scheme.last))
    return best_stretch, best_zeros


def _to_codes(scaled: Groups, zeros: NDArray[np.float32], scheme: QuantScheme) -> None:
    """Rounds to codes less their zero point, in place."""
    low, high = (np.float32(end) - zeros[:, :, None] for end in (scheme.first, scheme.last))
    np.rint(scaled, out=scaled)
    np.clip(scaled, low, high, out=scaled)


def _dot(a: Groups, b: Groups, weights: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """`<a, b>` of each group, weighted or not."""
    if weights is None:
        plain: NDArray[np.float32] = np.einsum("rgs,rgs->rg", a, b)
        return plain
    product: NDArray[np.float32] = np.matmul(a * b, weights)
    return product


def _explained(
    units: Groups, codes: Groups, weights: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """`<w, q>**2 / <q, q>`: what the best scale for these codes takes off the squared error."""
    along, square = _dot(units, codes, weights), _dot(codes, codes, weights)
    along *= along
    along /= np.where(square > 0, square, np.float32(1))
    return along


def _fit(
    units: Groups,
    stretch: NDArray[np.float32],
    zeros: NDArray[np.float32],
    scheme: QuantScheme,
    weights: NDArray[np.float32] | None,
) -> Rounded:
    """Codes, scales in units and zero points: least squares, then the nearest codes again."""
    codes = units * stretch[:, :, None]
    _to_codes(codes, zeros, scheme)
    along, square = _dot(units, codes, weights), _dot(codes, codes, weights)
    scales: NDArray[np.float32] = np.divide(
        along, square, out=np.ones_like(along), where=square > 0
    )
    np.multiply(units, rtn.inverse(scales)[:, :, None], out=codes)
    _to_codes(codes, zeros, scheme)
    return codes + zeros[:, :, None], scales, zeros


def _errors(
    units: Groups, made: Rounded, weights: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    codes, scales, zeros = made
    off = (codes - zeros[:, :, None]) * scales[:, :, None]
    off -= units
    return _dot(off, off, weights)
