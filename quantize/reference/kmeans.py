"""Palettes by exhaustion."""

from __future__ import annotations

import math
from collections.abc import Sequence


def least_palette_error(values: Sequence[float], counts: Sequence[float], size: int) -> float:
    """The least weighted squared error that any table of so many values can give.

    Exact: in one dimension the best clusters are runs of the sorted values, so the best for the
    first n with k values is, over every place where the last run can begin, the best for what is
    before with k - 1 and the error of that run about its mean.

    Args:
        values: What is replaced.
        counts: How much each counts.
        size: Values of the table.

    Source: Wang and Song 2011, "Ckmeans.1d.dp", The R Journal 3/2, equation 1.
    """
    pairs = sorted(zip(map(float, values), map(float, counts), strict=True))
    best = [0.0] + [math.inf] * len(pairs)
    for _ in range(size):
        best = [0.0] + [
            min(best[start] + _run_error(pairs[start:end]) for start in range(end))
            for end in range(1, len(pairs) + 1)
        ]
    return best[-1]


def nearest(value: float, table: Sequence[float]) -> set[int]:
    """The codes of the value of a table that is nearest to a weight, or of those alike."""
    off = [abs(float(entry) - float(value)) for entry in table]
    return {code for code, distance in enumerate(off) if distance == min(off)}


def _run_error(pairs: Sequence[tuple[float, float]]) -> float:
    count = sum(weight for _, weight in pairs)
    if not count:
        return 0.0
    mean = sum(value * weight for value, weight in pairs) / count
    return sum(weight * (value - mean) ** 2 for value, weight in pairs)
