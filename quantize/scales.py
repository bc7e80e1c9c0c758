"""Scales of few bits: rounded before codes are chosen, so that codes are right for what is kept."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lorgnette.errors import ConfigError
from lorgnette.quantize.scheme import QuantScheme

Scales = NDArray[np.float32]
TOP_BITS = np.uint32(0xFFFF0000)
"""The half of a float32 that is a bfloat16."""


def stored_scales(scales: Scales, scheme: QuantScheme) -> Scales:
    """The scales that a scheme can keep, nearest to these: for codes that are chosen after.

    Shapes: float32 `[rows, groups]`, whole rows, and returns the same.
    """
    if scheme.scale_bits == 32:
        return scales
    return short_scales(scales) if scheme.scale_bits == 16 else whole_scales(scales, scheme)


def short_scales(scales: Scales) -> Scales:
    """Scales rounded to 8 significant bits within float16, which bfloat16 holds exactly, too.

    One kind of 16 bits for every target: XNNPACK keeps scales of groups as bfloat16, others as
    float16, and codes are to mean the same numbers everywhere.

    Raises:
        ConfigError: One is too large for float16.
    """
    bits = np.ascontiguousarray(scales, np.float32).view(np.uint32)
    # Round half to even at the sixteenth bit: half of the last bit kept, less one where that is 0.
    kept = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & TOP_BITS
    short = kept.view(np.float32).reshape(scales.shape)
    # The least numbers of float32 round to 0 here; they have a least number of float16 to become.
    return half_scales(np.where(short == 0, scales, short))


def half_scales(scales: Scales) -> Scales:
    """Scales rounded to float16, as float32.

    A scale too small for float16 becomes its least number, with its sign, so that a group of tiny
    weights keeps what codes it can; 0 stays 0.

    Raises:
        ConfigError: One is too large.
    """
    with np.errstate(over="ignore"):  # told below
        half = scales.astype(np.float16)
    if not np.isfinite(half).all():
        raise ConfigError(
            "a scale is too large for 16 bits",
            got=float(np.abs(scales).max()),
            wanted=f"<= {float(np.finfo(np.float16).max):g}",
            hint="keep scales of 32 bits",
        )
    lost = (half == 0) & (scales != 0)
    half[lost] = np.copysign(np.finfo(np.float16).smallest_subnormal, scales[lost])
    return half.astype(np.float32)


def whole_scales(scales: Scales, scheme: QuantScheme) -> Scales:
    """Scales rounded to multiples of one number a row, at most `scheme.most_steps` either way.

    That number is a float16, rounded up, so that every product is exact in float32 and the largest
    scale keeps its range. A scale other than 0 becomes 0 never.

    Shapes: float32 `[rows, groups]`, whole rows, and returns the same.
    Source: the idea of scales of scales, ggml's k-quants and Dettmers et al. 2023, "QLoRA",
    arXiv 2305.14314, section 3 (double quantisation).
    """
    exact = np.abs(scales).max(axis=1, keepdims=True) / np.float32(scheme.most_steps)
    row = half_scales(exact)
    short = row < exact
    row[short] = half_scales(np.nextafter(row[short].astype(np.float16), np.float16(np.inf)))
    with np.errstate(invalid="ignore", divide="ignore"):
        steps = np.where(row > 0, np.rint(scales / row), 0)
    lost = (steps == 0) & (scales != 0)
    steps[lost] = np.sign(scales[lost])
    return (steps * row).astype(np.float32)


def split_scales(scales: Scales, most: int) -> tuple[NDArray[np.int8], Scales]:
    """Whole multiples, and the number of each row that scales are those multiples of.

    Shapes: float32 `[rows, groups]` to int8 `[rows, groups]` and float32 `[rows]`.

    Raises:
        ConfigError: A row's scales are not multiples, up to `most`, of any number.
    """
    largest = np.abs(scales).max(axis=1)
    steps = np.zeros(scales.shape, np.int8)
    row = np.zeros(len(scales), np.float32)
    left = np.flatnonzero(largest)
    for count in range(most, 0, -1):
        if not left.size:
            return steps, row
        number = largest[left] / np.float32(count)
        found = np.rint(scales[left] / number[:, None])
        fits = (found * number[:, None] == scales[left]).all(axis=1)
        steps[left[fits]], row[left[fits]] = found[fits], number[fits]
        left = left[~fits]
    if left.size:
        raise ConfigError(
            "the scales of a row are not whole multiples of one number",
            got=f"row {left[0]}",
            wanted=f"multiples up to {most}",
            hint="the method that made them must round them before it chooses codes",
        )
    return steps, row
