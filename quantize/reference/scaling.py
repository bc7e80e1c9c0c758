"""Factors of channels, one number at a time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

Rows = Sequence[Sequence[float]]


def smoothquant_factors(
    inputs: Rows, consumers: Sequence[Rows], channel_of_column: Sequence[int], share: float
) -> list[float]:
    """`max|x|**a / max|w|**(1 - a)` of each channel over the median of all."""
    weights = [row for matrix in consumers for row in matrix]
    return _over_median(
        [
            (
                max(abs(value) for value in _of(inputs, channel_of_column, channel)),
                max(abs(value) for value in _of(weights, channel_of_column, channel)),
            )
            for channel in range(max(channel_of_column) + 1)
        ],
        share,
    )


def awq_factors(
    inputs: Rows,
    consumers: Sequence[Rows],
    channel_of_column: Sequence[int],
    shares: Sequence[float],
    rounded: Callable[[list[float]], list[float]],
) -> list[float]:
    """`mean|x|**r / mean|w|**(1 - r)`, of all r and none the one with the least output error.

    Args:
        inputs: Positions.
        consumers: Matrices, row by row.
        channel_of_column: The channel that each column reads.
        shares: Every r.
        rounded: What is left of a row of weights.
    """
    weights = [row for matrix in consumers for row in matrix]
    sizes = [
        (
            statistics.fmean(abs(value) for value in _of(inputs, channel_of_column, channel)),
            statistics.fmean(abs(value) for value in _of(weights, channel_of_column, channel)),
        )
        for channel in range(max(channel_of_column) + 1)
    ]
    tried = [[1.0] * len(sizes), *(_over_median(sizes, share) for share in shares)]
    errors = []
    for factors in tried:
        by_column = [factors[channel] for channel in channel_of_column]
        error = 0.0
        for row in weights:
            left = rounded([w * s for w, s in zip(row, by_column, strict=True)])
            for position in inputs:
                exact = sum(x * w for x, w in zip(position, row, strict=True))
                made = sum(x / s * w for x, s, w in zip(position, by_column, left, strict=True))
                error += (made - exact) ** 2
        errors.append(error)
    return tried[errors.index(min(errors))]


def _of(rows: Rows, channel_of_column: Sequence[int], channel: int) -> list[float]:
    """Every number in the columns of a channel."""
    return [
        row[column]
        for row in rows
        for column, owner in enumerate(channel_of_column)
        if owner == channel
    ]


def _over_median(sizes: Sequence[tuple[float, float]], share: float) -> list[float]:
    """Factors of channels with inputs and weights; those without get 1."""
    found = {
        channel: x**share / w ** (1 - share) for channel, (x, w) in enumerate(sizes) if x and w
    }
    middle = math.exp(statistics.median(map(math.log, found.values()))) if found else 1.0
    return [found[channel] / middle if channel in found else 1.0 for channel in range(len(sizes))]
