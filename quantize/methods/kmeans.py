"""Palettes by k-means: each weight becomes the nearest of a few values found for its rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lorgnette.errors import ConfigError
from lorgnette.quantize.blocks import BLOCK_ELEMENTS
from lorgnette.quantize.inputs import LayerInputs
from lorgnette.quantize.scheme import QuantScheme, QuantTensor

Exact = NDArray[np.float64]

NEEDS_INPUTS = False

ROUNDS = 60
BINS_A_VALUE, MOST_BINS = 8, 1024
HISTOGRAM = 4096
MOST_VALUES = 1 << 24
"""Weights that a table is found from; of a larger matrix some rows, evenly taken."""


def quantize(
    weight: NDArray[np.float32], scheme: QuantScheme, inputs: LayerInputs | None = None
) -> QuantTensor:
    """Lowers the squared error, each weight replaced by the nearest value of its table.

    Rounds of two steps: weights go to the nearest value, values become the mean of their weights.
    In one dimension the weights of a value lie together, so on sorted weights a round costs one
    search for each border and two differences of running sums, and is exact. As rounds end in the
    nearest rest, which may be a poor one, they start from the best of all tables on weights put
    into a few hundred bins: by dynamic programming, the best k runs of bins up to a place are the
    best k - 1 up to an earlier one and the run between. A matrix with no more values than a table
    holds is kept as it is.

    Where inputs are given, the squared error of a column counts by the mean square of its input.

    Shapes: `weight` float32 `[rows, columns]`.

    Raises:
        ConfigError: The scheme is no palette.

    Source: Lloyd 1982, "Least squares quantization in PCM"; for weights, Han et al. 2015, "Deep
    Compression", arXiv 1510.00149, section 3; the start, Wang and Song 2011, "Ckmeans.1d.dp", The
    R Journal 3/2, equation 1.
    """
    if not scheme.palette:
        raise ConfigError(
            "the method 'kmeans' makes palettes", got=scheme.form, hint="set palette = true"
        )
    rows, columns = weight.shape
    shares = np.ones(columns) if inputs is None else _shares(inputs)
    together = scheme.table_rows or rows
    tables = np.empty((scheme.tables(rows), 1 << scheme.bits), np.float32)
    codes = np.empty((rows, columns), np.uint8)
    step = max(1, BLOCK_ELEMENTS // max(columns, 1))
    for number, table in enumerate(tables):
        own = slice(number * together, (number + 1) * together)
        table[:] = find_table(weight[own], shares, len(table))
        borders = _borders(table.astype(np.float64))
        for start in range(own.start, min(own.stop, rows), step):
            part = slice(start, min(start + step, own.stop))
            codes[part] = np.searchsorted(borders, weight[part])
    ones, zeros = np.ones((rows, 1), np.float32), np.zeros((rows, 1), np.uint8)
    return QuantTensor(codes, ones, zeros, columns, scheme, tables)


def find_table(weight: NDArray[np.float32], shares: Exact, size: int) -> NDArray[np.float32]:
    """So many values, rising, that serve some rows best; the last repeated if fewer are needed.

    Shapes: `weight` `[rows, columns]`; `shares`, how much each column counts, `[columns]`.
    """
    some = weight[:: -(-weight.size // MOST_VALUES)]
    distinct = np.unique(some)
    if len(distinct) <= size:
        return np.pad(distinct, (0, size - len(distinct)), mode="edge")
    data = _sorted(some, shares)
    values = _best_runs(data, _bins(data, size), size)
    for _ in range(ROUNDS):
        before, values = values, _means(data, values)
        if np.array_equal(values, before):
            break
    return values.astype(np.float32)


class _Sorted(NamedTuple):
    """Weights in rising order with running sums, each from 0, one longer than the weights."""

    values: Exact
    counts: Exact
    sums: Exact


def _sorted(weight: NDArray[np.float32], shares: Exact) -> _Sorted:
    flat = weight.ravel().astype(np.float64)
    order = np.argsort(flat, kind="stable")
    flat = flat[order]
    counts = np.broadcast_to(shares, weight.shape).reshape(-1)[order]
    return _Sorted(
        flat,
        np.concatenate([[0.0], np.cumsum(counts)]),
        np.concatenate([[0.0], np.cumsum(counts * flat)]),
    )


def _bins(data: _Sorted, size: int) -> NDArray[np.int64]:
    """Places in the sorted weights between which bins lie, the first 0, the last behind all.

    A third of them at equal shares of the weights, a third at equal steps, and a third between
    the two, at equal shares of the cube root of the density: so that a bin has few weights or is
    narrow.
    """
    count = min(max(BINS_A_VALUE * size, 128), MOST_BINS) // 3
    middles = np.linspace(0, 1, count + 1)
    edges = np.linspace(data.values[0], data.values[-1], HISTOGRAM + 1)
    below = data.counts[np.searchsorted(data.values, edges[1:-1])]
    density = np.cbrt(np.diff(below, prepend=0.0, append=data.counts[-1]))
    running = np.concatenate([[0.0], np.cumsum(density)])
    ends = len(data.values)
    places = [
        np.searchsorted(data.counts, middles * data.counts[-1]),
        np.searchsorted(data.values, data.values[0] + middles * (data.values[-1] - data.values[0])),
        np.searchsorted(data.values, np.interp(middles * running[-1], running, edges)),
        [0, ends],
    ]
    return np.unique(np.clip(np.concatenate(places), 0, ends)).astype(np.int64)


def _best_runs(data: _Sorted, places: NDArray[np.int64], size: int) -> Exact:
    """The means of the runs of bins, so many, with the least squared error."""
    counts, sums = data.counts[places], data.sums[places]
    between = counts - counts[:, None]
    # Squared errors less the sum of squares, which is the same for all.
    cost = np.full(between.shape, np.inf)
    np.divide(-((sums - sums[:, None]) ** 2), between, out=cost, where=between > 0)
    best = cost[0]
    best[0] = 0.0
    starts = []
    for _ in range(1, min(size, len(places) - 1)):
        whole = best[:, None] + cost
        # As good with a value less: a run that begins where it ends.
        np.fill_diagonal(whole, best)
        start = whole.argmin(axis=0)
        best = whole[start, np.arange(len(start))]
        starts.append(start)
    at = [len(places) - 1]
    for start in reversed(starts):
        at.append(start[at[-1]])
    runs = np.unique([0, *at])
    means = np.diff(sums[runs]) / np.diff(counts[runs])
    return np.pad(means, (0, size - len(means)), mode="edge")


def _means(data: _Sorted, values: Exact) -> Exact:
    """The means of each value's weights; values without weights stay where they are."""
    places = np.searchsorted(data.values, _borders(values))
    places = np.concatenate([[0], places, [len(data.values)]])
    counts, sums = np.diff(data.counts[places]), np.diff(data.sums[places])
    return np.divide(sums, counts, out=values.copy(), where=counts > 0)


def _borders(values: Exact) -> Exact:
    """The middles between neighbouring values."""
    middles: Exact = (values[1:] + values[:-1]) / 2
    return middles


def _shares(inputs: LayerInputs) -> Exact:
    """How much each column counts, around 1 and none quite 0."""
    squares: Exact = np.maximum(np.diagonal(inputs.second_moment), 0).astype(np.float64)
    mean = squares.mean()
    return np.maximum(squares / mean, 1e-6) if mean > 0 else np.ones_like(squares)
