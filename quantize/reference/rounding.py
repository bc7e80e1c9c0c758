"""Rounding to steps: to nearest, with least squared error, and what errors come to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lorgnette.quantize.scheme import QuantTensor

Group = NDArray[np.float32]


def rtn_group(group: Group, bits: int) -> tuple[list[int], np.float32]:
    """Codes and scale of one group by symmetric round to nearest, in scalar arithmetic.

    Returns:
        The codes, 0 .. 2**bits - 1, and the scale.
    """
    half = 2 ** (bits - 1)
    extreme = max(group, key=lambda value: (abs(float(value)), float(value)))
    scale = np.float32(extreme) / np.float32(-half)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale
    if not np.isfinite(inverse):
        return [half] * len(group), scale
    codes = [round(float(np.float32(value) * inverse)) + half for value in group]
    return [min(max(code, 0), 2 * half - 1) for code in codes], scale


def rtn_group_asymmetric(group: Group, bits: int) -> tuple[list[int], np.float32, int]:
    """Codes, scale and zero point of one group by asymmetric round to nearest.

    The scale is at most what the last code can be multiplied by in float32.
    """
    last = 2**bits - 1
    low, high = (np.float32(end(0.0, *map(float, group))) for end in (min, max))
    most = np.nextafter(np.finfo(np.float32).max / np.float32(last), np.float32(0))
    scale = min(high / np.float32(last) - low / np.float32(last), most)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale
    if not np.isfinite(inverse):
        return [0] * len(group), scale, 0
    zero = min(max(round(float(-low * inverse)), 0), last)
    codes = [round(float(np.float32(value) * inverse)) + zero for value in group]
    return [min(max(code, 0), last) for code in codes], scale, zero


def least_squared_error(group: Group, bits: int, zero: int) -> float:
    """The least squared error that any positive or negative scale can give a group.

    Exact: as the scale changes, a code only changes where its weight lies halfway between two.
    So between neighbouring such places the codes stand still and the best scale is that of least
    squares; every interval is tried.
    """
    values = [float(value) for value in group]
    least = sum(value * value for value in values)
    for sign in (1.0, -1.0):
        turned = [sign * value for value in values]
        for stretch in _between(_turning_points(turned, bits, zero)):
            codes = [
                min(max(round(value * stretch), -zero), 2**bits - 1 - zero) for value in turned
            ]
            square = sum(code * code for code in codes)
            if square:
                scale = sum(v * c for v, c in zip(turned, codes, strict=True)) / square
                error = sum((v - c * scale) ** 2 for v, c in zip(turned, codes, strict=True))
                least = min(least, error)
    return least


def _turning_points(values: Sequence[float], bits: int, zero: int) -> list[float]:
    """Inverse scales at which some code changes."""
    halves = [code + 0.5 for code in range(-zero, 2**bits - 1 - zero)]
    found = {half / value for value in values if value for half in halves if half / value > 0}
    return sorted(point for point in found if math.isfinite(point))


def _between(points: Sequence[float]) -> Iterator[float]:
    """A point of every interval, the one without end included."""
    for low, high in pairwise(points):
        yield (low + high) / 2
    if points:
        yield 2 * points[-1]


def squared_errors(weight: NDArray[np.float32], made: QuantTensor) -> NDArray[np.float64]:
    """The squared error of every group, float64 `[rows, groups]`."""
    return _by_group(_off(weight, made) ** 2, made)


def root_errors(weight: NDArray[np.float32], made: QuantTensor) -> NDArray[np.float64]:
    """The sum of the roots of the errors of every group, what `hqq` lowers."""
    return _by_group(np.sqrt(np.abs(_off(weight, made))), made)


def _off(weight: NDArray[np.float32], made: QuantTensor) -> NDArray[np.float64]:
    rows, groups = made.scales.shape
    codes = made.codes.reshape(rows, groups, -1).astype(np.float64)
    back = (codes - made.zero_points[:, :, None]) * made.scales[:, :, None].astype(np.float64)
    off: NDArray[np.float64] = back.reshape(rows, -1)
    off[:, : made.columns] -= weight
    return off


def _by_group(values: NDArray[np.float64], made: QuantTensor) -> NDArray[np.float64]:
    rows, groups = made.scales.shape
    total: NDArray[np.float64] = values.reshape(rows, groups, -1).sum(axis=2)
    return total
