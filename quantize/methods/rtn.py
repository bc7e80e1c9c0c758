"""Round to nearest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lorgnette.quantize.blocks import Groups, Rounded, by_rows
from lorgnette.quantize.inputs import LayerInputs
from lorgnette.quantize.scales import stored_scales
from lorgnette.quantize.scheme import QuantScheme, QuantTensor

LARGEST = np.finfo(np.float32).max


NEEDS_INPUTS = False


def quantize(
    weight: NDArray[np.float32], scheme: QuantScheme, inputs: LayerInputs | None = None
) -> QuantTensor:
    """Rounds each group of a matrix to its nearest codes.

    Symmetric: the element of largest magnitude in a group maps to the code of largest magnitude,
    which is negative. With m that element (the positive one of two alike), scale =
    m / -2**(bits-1), so all 2**bits codes are in use; of narrow codes, m / -64.

    Asymmetric: the range from the least to the greatest element, stretched to contain 0, is cut
    into 2**bits - 1 steps. With [l, h] that range, scale = (h - l) / (2**bits - 1) and the zero
    point is round(-l / scale), so that 0 stays 0.

    A group of zeros has scale 0 and stays zero.

    Shapes: `weight` float32 `[rows, columns]`.
    Source: symmetric, the block format of ggml (Q4_0), as also used by ONNX MatMulNBits;
    asymmetric, Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", arXiv 1712.05877, section 2.1 and equation 13.
    """
    del inputs
    return by_rows(weight, scheme, lambda groups: rounded(groups, scheme))


def rounded(groups: Groups, scheme: QuantScheme) -> Rounded:
    """Rounds groups `[rows, groups, group_size]` to nearest; see `quantize`."""
    scales, zeros = steps(groups, scheme)
    codes = groups * inverse(scales)[:, :, None]
    np.rint(codes, out=codes)
    codes += zeros[:, :, None]
    np.clip(codes, scheme.first, scheme.last, out=codes)
    return codes, scales, zeros


def steps(groups: Groups, scheme: QuantScheme) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scales and zero points `[rows, groups]`, both float32, of rounding to nearest."""
    highest, lowest = groups.max(axis=2), groups.min(axis=2)
    if scheme.symmetric:
        least = np.float32(scheme.first - scheme.middle)
        scales = np.where(highest >= -lowest, highest, lowest) / least
        return stored_scales(scales, scheme), np.full_like(scales, scheme.middle)
    last = np.float32((1 << scheme.bits) - 1)
    lowest, highest = np.minimum(lowest, 0), np.maximum(highest, 0)
    # Divided before the subtraction, and a hair below, lest the ends of float32 overflow.
    most = np.nextafter(LARGEST / last, np.float32(0))
    scales = stored_scales(np.minimum(highest / last - lowest / last, most), scheme)
    zeros = np.rint(-lowest * inverse(scales))
    return scales, np.clip(zeros, 0, last)


def inverse(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """One over each scale; 0 for a scale of zero, or one so small that its inverse overflows."""
    with np.errstate(divide="ignore", over="ignore"):
        found = np.float32(1) / scales
    found[~np.isfinite(found)] = 0
    return found


def recoded(groups: Groups, made: Rounded, scheme: QuantScheme) -> Rounded:
    """The nearest codes once more, for the scales that the scheme can keep of `made`.

    Shapes: whole rows where scales are of 8 bits, which share a number in each row.
    """
    if scheme.scale_bits == 32:
        return made
    zeros = made[2]
    scales = stored_scales(made[1], scheme)
    codes = groups * inverse(scales)[:, :, None]
    np.rint(codes, out=codes)
    codes += zeros[:, :, None]
    np.clip(codes, scheme.first, scheme.last, out=codes)
    return codes, scales, zeros


def unless_too_large(made: Rounded, plain: Rounded, scheme: QuantScheme) -> Rounded:
    """`made`, but `plain` for groups whose scale might take a code past the end of float32."""
    fits = np.abs(made[1]) <= LARGEST / np.float32(1 << scheme.bits)
    return (
        np.where(fits[:, :, None], made[0], plain[0]),
        np.where(fits, made[1], plain[1]),
        np.where(fits, made[2], plain[2]),
    )
