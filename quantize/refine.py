"""A last look at every code and scale, all others held."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lorgnette.quantize.methods import rtn
from lorgnette.quantize.scales import stored_scales
from lorgnette.quantize.scheme import QuantScheme, QuantTensor

Array = NDArray[np.float32]

BLOCK = 128
"""Columns whose errors are looked up together; no group is wider."""
STRIDE = 16
ROWS = 1024


def refined(weight: Array, moment: Array, made: QuantTensor) -> QuantTensor:
    """Lowers tr(E H E^T) of the errors E = W - Q further, by one pass of coordinate descent.

    A column after the other takes the codes that are best with all others as they are, which are
    those nearest to q_j + (E H)_j / H_jj; then each group the scale that is best for its codes c
    (less the zero point), s + <c, E H> / <c, H c>, as near to that as the scheme can keep it.
    Neither step can raise the error, but for that rounding.

    Only for schemes of groups: measured on the zoo, 6 to 8 % of the error of GPTQ goes there, but
    1 % where a scale is for a whole row.

    Shapes: `weight` `[rows, columns]`, `moment` `[columns, columns]`, the matrix H.

    Source: Behdin et al. 2023, "QuantEase: Optimization-based Quantization for Language Models",
    arXiv 2309.01885, lemma 1 and algorithm 1; the scales by least squares.
    """
    rows, columns = weight.shape
    padded = made.codes.shape[1]
    related = np.zeros((padded, padded), np.float32)
    related[:columns, :columns] = moment
    # Where the inputs are always 0, nothing pulls.
    own = np.where(related.diagonal() > 0, related.diagonal(), np.float32(1))
    codes, scales = np.empty_like(made.codes), np.empty_like(made.scales)
    for start in range(0, rows, ROWS):
        part = slice(start, start + ROWS)
        turned = np.zeros((padded, len(weight[part])), np.float32)
        turned[:columns] = weight[part].T
        zeros = made.zero_points[part].T.astype(np.float32)
        state = _Rows(turned, made.codes[part].T.astype(np.float32), made.scales[part].T, zeros)
        for first in range(0, padded, BLOCK):
            state.visit(first, related, own, made.scheme)
        codes[part], scales[part] = state.codes.T, state.scales.T
    return replace(made, codes=codes, scales=scales)


class _Rows:
    """Some rows, a column a line: codes `[columns, rows]`, scales and zero points by group."""

    def __init__(self, weight: Array, codes: Array, scales: Array, zeros: Array) -> None:
        self.codes, self.scales, self.zeros = codes, scales.copy(), zeros
        self._size = len(codes) // len(scales)
        self._made = (codes - self._by_column(zeros)) * self._by_column(self.scales)
        self._off = weight - self._made

    def visit(self, first: int, moment: Array, own: Array, scheme: QuantScheme) -> None:
        """Improves the codes of a block of columns, then the scales of its groups."""
        block = slice(first, min(first + BLOCK, len(self.codes)))
        pull = moment[block] @ self._off
        within = moment[block, block]
        for at in range(0, len(pull), STRIDE):
            stride = slice(first + at, min(first + at + STRIDE, block.stop))
            near = moment[stride, stride]
            moved = self._codes(stride, pull[at : at + STRIDE], near, own[stride], scheme)
            pull += within[:, at : at + STRIDE] @ moved
        if scheme.scale_bits == 8:
            return  # a row's scales are multiples of one number, and only move together
        for at in range(0, len(pull), self._size):
            self._scale(first + at, at, pull, within[:, at : at + self._size], scheme)

    def _codes(
        self, stride: slice, pull: Array, near: Array, own: Array, scheme: QuantScheme
    ) -> Array:
        """New codes of a few columns of a group; returns what their errors have grown by."""
        group = stride.start // self._size
        scales, zeros = self.scales[group], self.zeros[group]
        inverse = rtn.inverse(scales)
        pull, moved = pull.copy(), np.empty_like(pull)
        for at, column in enumerate(range(stride.start, stride.stop)):
            wanted = self._made[column] + pull[at] / own[at]
            codes = np.clip(np.rint(wanted * inverse) + zeros, scheme.first, scheme.last)
            made = (codes - zeros) * scales
            moved[at] = self._made[column] - made
            self.codes[column], self._made[column] = codes, made
            self._off[column] += moved[at]
            pull += near[:, at, None] * moved[at]
        return moved

    def _scale(self, first: int, at: int, pull: Array, within: Array, scheme: QuantScheme) -> None:
        """A new scale for the group at a column, which is `at` in the block."""
        group, own = first // self._size, slice(first, first + self._size)
        less = self.codes[own] - self.zeros[group]
        along = np.einsum("cr,cr->r", less, pull[at : at + self._size])
        square = np.einsum("cr,cr->r", less, within[at : at + self._size] @ less)
        more = np.divide(along, square, out=np.zeros_like(along), where=square > 0)
        kept = stored_scales((self.scales[group] + more)[:, None], scheme)[:, 0]
        more = kept - self.scales[group]
        self.scales[group] = kept
        moved = less * more
        self._made[own] += moved
        self._off[own] -= moved
        pull -= within @ moved

    def _by_column(self, values: Array) -> Array:
        return values.repeat(self._size, axis=0)
