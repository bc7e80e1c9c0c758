"""AWQ: channels with large inputs get finer steps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lorgnette.quantize.scaling.site import Array, SiteWeights, balanced

SHARES = tuple(at / 10 for at in range(11))


def factors(site: SiteWeights) -> NDArray[np.float32]:
    """Factors `size_x**r / size_w**(1 - r)` with the r whose outputs come out nearest.

    Sizes are the means of `|x|` over all positions and of `|w|` over the rows of all consumers.
    Each r of a grid from 0 to 1 is tried on the sampled positions, with inputs rounded where the
    engine will round them, and no scaling besides, which is kept unless another is better. The
    median of the factors is made 1.

    Shapes: float32 `[channels]`.
    Source: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and
    Acceleration", arXiv 2306.00978, equations 4 and 5; the size of the weights is in the factor as
    in the authors' later code.
    """
    inputs = site.mean_by_channel(site.inputs.mean_size)
    rows = sum(len(matrix) for matrix in site.consumers)
    columns = sum(np.abs(matrix).sum(axis=0, dtype=np.float64) for matrix in site.consumers) / rows
    weights = site.mean_by_channel(np.asarray(columns, np.float32))
    outputs = tuple(site.inputs.rows @ matrix.T for matrix in site.consumers)
    best = np.ones(site.channels, np.float32)
    least = output_error(site, best, outputs)
    for share in SHARES:
        found = balanced(inputs, weights, share)
        error = output_error(site, found, outputs)
        if error < least:
            best, least = found, error
    return best


def output_error(site: SiteWeights, found: Array, outputs: tuple[Array, ...]) -> float:
    """The squared error of all consumers' outputs on the sampled positions, under some factors.

    Args:
        site: The matrices and their inputs.
        found: The factors, `[channels]`.
        outputs: What the consumers give unrounded, `[R, rows_i]`.
    """
    by_column = found[site.channel_of_column]
    inputs = site.inputs.rows / by_column
    if site.round_inputs is not None:
        inputs = site.round_inputs(inputs)
    total = 0.0
    for number, (matrix, wanted) in enumerate(zip(site.consumers, outputs, strict=True)):
        off = inputs @ site.round(matrix * by_column, number).T
        off -= wanted
        total += float(np.vdot(off, off))
    return total
