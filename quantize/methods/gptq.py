"""GPTQ: the columns still to be rounded make up for the errors of those that are."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lorgnette.errors import ConfigError
from lorgnette.quantize.blocks import by_rows
from lorgnette.quantize.inputs import LayerInputs
from lorgnette.quantize.methods import mse, rtn
from lorgnette.quantize.refine import refined
from lorgnette.quantize.scheme import QuantScheme, QuantTensor

Array = NDArray[np.float32]

NEEDS_INPUTS = True

DAMPING = 0.01
BLOCK = 128
"""Columns whose errors reach the later ones together; no group is wider."""
STRIDE = 16
"""Columns whose errors reach the rest of their block together; groups are multiples of it."""
ROWS = 1024
"""Rows worked on at a time: a stride of them fits a core's cache."""


def quantize(weight: Array, scheme: QuantScheme, inputs: LayerInputs | None = None) -> QuantTensor:
    """Lowers tr(E H E^T) of the errors E = W - Q, with H the second moment of the inputs.

    Columns are rounded one after the other. With U^T U the inverse of H, U upper triangular, the
    error e_j = (w_j - q_j) / U_jj of a column is taken from the later ones, w_k -= e_j * U_jk,
    which is the best that they can do about it. Where a group begins, its step is fixed by the
    search of `mse` on its weights as they are by then, with squared errors weighted by 1 / U_jj^2:
    what remains of tr(E H E^T) in the end is the sum of (w_j - q_j)^2 / U_jj^2.

    The inverse is never formed: with H = R R^T, R upper triangular and so U = R^-1, a block of
    columns b receives from all errors E_d before it E_d R_db R_bb^-1, and only R_bb is inverted.

    What differs from the paper, each measured on the zoo: H is damped by 1 % of its own diagonal
    and not of the mean of it, lest channels of small inputs are lost beside outliers (there it
    halves the remaining error); groups are taken by falling mean of the diagonal, and columns
    within a group by falling diagonal, which leaves all groups in their places (5 to 20 % less).
    Rows that come out worse than by round to nearest are rounded to nearest (all of them, where
    they share a scale).

    A column whose inputs are always 0 gets codes that mean 0.

    Shapes: `weight` float32 `[rows, columns]`.

    Raises:
        ConfigError: The inputs are missing, of another width, or not finite.

    Source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative
    Pre-trained Transformers", arXiv 2210.17323, equations 2 to 4 and algorithm 1; the form without
    an inverse: Chee et al. 2023, "QuIP", arXiv 2307.13304, section 3.1 and theorem 6.
    """
    moment = _moment(weight, inputs)
    alive = np.where(np.diagonal(moment) > 0, weight, np.float32(0))
    # What is too large for float32 ends as rows that are rounded to nearest.
    with np.errstate(over="ignore", invalid="ignore"):
        found = _rounded(alive, scheme, feedback(moment, scheme))
        if scheme.group_size:
            damped = moment + np.diag(np.float32(DAMPING) * np.diagonal(moment))
            found = refined(alive, damped, found)
        return _better_rows(weight, moment, found, rtn.quantize(alive, scheme))


class Feedback(NamedTuple):
    """How the errors of columns reach others, in the order in which they are rounded."""

    order: NDArray[np.int64]
    """The column at each place, those that fill up the last group included."""
    reach: Array
    """R, each column divided by its end: upper triangular with ones on the diagonal."""
    back: tuple[Array, ...]
    """The inverses of the blocks on the diagonal of `reach`."""
    cost: Array
    """The squared diagonal of R: what a squared error costs at each place."""


def feedback(moment: Array, scheme: QuantScheme) -> Feedback:
    """The order of columns and how errors pass, from the second moment of the inputs."""
    columns = len(moment)
    diagonal = np.zeros(scheme.padded(columns))
    diagonal[:columns] = np.maximum(np.diagonal(moment), 0)
    groups = diagonal.reshape(scheme.groups(columns), -1)
    first = np.argsort(-groups.mean(axis=1), kind="stable")
    within = np.argsort(-groups[first], axis=1, kind="stable")
    order = (first[:, None] * groups.shape[1] + within).ravel()

    # All sizes taken out, the matrix is one of correlations, and safe to factor.
    size = np.sqrt(diagonal[order])
    inverse = np.divide(1, size, out=np.zeros_like(size), where=size > 0)
    padded = np.zeros((len(order), len(order)))
    padded[:columns, :columns] = moment
    related = padded[np.ix_(order, order)]
    del padded
    related *= inverse
    related *= inverse[:, None]
    root = _factor(related)
    ends = root.diagonal().copy()
    root *= size[:, None]
    root *= inverse / ends
    np.fill_diagonal(root, 1)
    back = tuple(
        np.linalg.inv(root[at : at + BLOCK, at : at + BLOCK]).astype(np.float32)
        for at in range(0, len(root), BLOCK)
    )
    cost = (size * ends) ** 2
    return Feedback(order, root.astype(np.float32), back, cost.astype(np.float32))


def _factor(related: NDArray[np.float64]) -> NDArray[np.float64]:
    """The upper triangular R with `R R^T` a matrix of correlations, damped.

    More than usual where a matrix is not one of correlations after all: a damping as large as the
    matrix is wide always suffices.
    """
    np.clip(related, -1, 1, out=related)
    damping = DAMPING
    while True:
        np.fill_diagonal(related, 1 + damping)
        try:
            # Both axes turned round, the lower triangle becomes the upper.
            root = np.asarray(np.linalg.cholesky(related[::-1, ::-1]), np.float64)
            return root[::-1, ::-1]
        except np.linalg.LinAlgError:
            damping *= 10


def _moment(weight: Array, inputs: LayerInputs | None) -> Array:
    columns = weight.shape[1]
    if inputs is None:
        raise ConfigError(
            "the method 'gptq' needs what calibration saw", hint="calibrate, or use 'mse'"
        )
    moment = inputs.second_moment
    if moment.shape != (columns, columns):
        raise ConfigError(
            "the inputs are not those of the matrix",
            got=f"a second moment of shape {list(moment.shape)}",
            wanted=[columns, columns],
        )
    if not np.isfinite(moment).all():
        raise ConfigError("the inputs that calibration saw are not finite")
    return moment


def _rounded(weight: Array, scheme: QuantScheme, fed: Feedback) -> QuantTensor:
    rows, columns = weight.shape
    codes = np.empty((rows, len(fed.order)), np.uint8)
    scales = np.empty((rows, scheme.groups(columns)), np.float32)
    zeros = np.empty_like(scales)
    if not _moves(scheme):
        # No feedback changes the steps of whole rows, nor those of the whole matrix.
        fixed = _whole(weight, scheme, fed)
        scales[:], zeros[:] = fixed.scales, fixed.zero_points
    for start in range(0, rows, ROWS):
        part = slice(start, start + ROWS)
        turned = np.zeros((codes.shape[1], len(weight[part])), np.float32)
        turned[:columns] = weight[part].T
        steps = np.ascontiguousarray(scales[part].T), np.ascontiguousarray(zeros[part].T)
        made = np.empty(turned.shape, np.uint8)
        made[fed.order] = _round_columns(turned[fed.order], steps, scheme, fed)
        codes[part], scales[part], zeros[part] = made.T, steps[0].T, steps[1].T
    return QuantTensor(codes, scales, zeros.astype(np.uint8), columns, scheme)


def _moves(scheme: QuantScheme) -> bool:
    """Whether the steps of a group are its own, and fixed when its turn comes.

    Scales of 8 bits are multiples of one number a row, which is known at the start or never.
    """
    return scheme.group_size > 0 and scheme.scale_bits != 8


def _whole(weight: Array, scheme: QuantScheme, fed: Feedback) -> QuantTensor:
    if scheme.per_tensor or scheme.group_size:
        return mse.quantize(weight, scheme)
    weights = np.empty_like(fed.cost)
    weights[fed.order] = _shares(fed.cost)
    return by_rows(weight, scheme, lambda groups: mse.searched(groups, scheme, weights))


def _round_columns(
    weight: Array, steps: tuple[Array, Array], scheme: QuantScheme, fed: Feedback
) -> NDArray[np.uint8]:
    """Codes of some rows, a column after the other.

    Shapes: `weight` `[columns, rows]` in the order of `fed`; `steps` are scales and zero points
    `[groups, rows]`, which are filled in where groups have steps of their own.
    """
    codes = np.empty(weight.shape, np.uint8)
    off = np.empty_like(weight)
    for start, back in zip(range(0, len(weight), BLOCK), fed.back, strict=True):
        block = slice(start, start + BLOCK)
        wanted = weight[block] + back.T @ (fed.reach[:start, block].T @ off[:start])
        off[block] = weight[block]
        for first in range(start, start + len(wanted), STRIDE):
            at = first - start
            if _moves(scheme) and first % scheme.group_size == 0:
                _fix_steps(wanted[at : at + scheme.group_size], first, steps, scheme, fed)
            stride = wanted[at : at + STRIDE]
            made = _round_stride(stride, first, steps, scheme, fed, back[at:, at:])
            codes[first : first + STRIDE] = made[0]
            off[first : first + STRIDE] -= made[1]
            # Of `stride`, what was wanted and not had is left.
            rest = slice(at + STRIDE, None)
            wanted[rest] -= back[at : at + STRIDE, rest].T @ stride
    return codes


def _fix_steps(
    wanted: Array, first: int, steps: tuple[Array, Array], scheme: QuantScheme, fed: Feedback
) -> None:
    """Fixes the steps of the group that begins at place `first`, by its weights as they are now."""
    group = fed.order[first] // scheme.group_size
    weights = _shares(fed.cost[first : first + scheme.group_size])
    groups = np.ascontiguousarray(wanted.T)[:, None]
    _, scales, zeros = mse.searched(groups, scheme, weights)
    steps[0][group], steps[1][group] = scales[:, 0], zeros[:, 0]


def _round_stride(
    wanted: Array,
    first: int,
    steps: tuple[Array, Array],
    scheme: QuantScheme,
    fed: Feedback,
    back: Array,
) -> tuple[Array, Array]:
    """Rounds some columns of one group; leaves in `wanted` what each could not be given.

    Returns:
        Their codes and the weights that these stand for.
    """
    group = fed.order[first] // (scheme.group_size or len(fed.order))
    scales, zeros = steps[0][group], steps[1][group]
    inverse = rtn.inverse(scales)
    codes, made = np.empty_like(wanted), np.empty_like(wanted)
    for at, column in enumerate(wanted):
        code, value = codes[at], made[at]
        np.multiply(column, inverse, out=code)
        np.rint(code, out=code)
        code += zeros
        np.clip(code, scheme.first, scheme.last, out=code)
        np.subtract(code, zeros, out=value)
        value *= scales
        column -= value
        wanted[at + 1 :] -= back[at, at + 1 : len(wanted), None] * column
    return codes, made


def _better_rows(
    weight: Array, moment: Array, found: QuantTensor, plain: QuantTensor
) -> QuantTensor:
    """Of two results the better one of each row, or of all where rows share a scale.

    `plain` where errors are too large to compare.
    """
    costs = np.empty((2, len(weight)))
    for start in range(0, len(weight), ROWS):
        part = slice(start, start + ROWS)
        for cost, made in zip(costs, (found, plain), strict=True):
            some = replace(
                made,
                codes=made.codes[part],
                scales=made.scales[part],
                zero_points=made.zero_points[part],
            )
            off = some.dequantize() - weight[part]
            cost[part] = np.einsum("rc,rc->r", off @ moment, off)
    if found.scheme.per_tensor:
        costs[:] = costs.sum(axis=1, keepdims=True)
    better = np.isfinite(costs[0]) & (costs[0] <= costs[1])
    return replace(
        found,
        codes=np.where(better[:, None], found.codes, plain.codes),
        scales=np.where(better[:, None], found.scales, plain.scales),
        zero_points=np.where(better[:, None], found.zero_points, plain.zero_points),
    )


def _shares(cost: Array) -> Array:
    """Costs as weights around 1, none quite 0."""
    mean = cost.mean()
    return np.maximum(cost / mean, np.float32(1e-6)) if mean > 0 else np.ones_like(cost)
