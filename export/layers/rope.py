"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(positions: int, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles.

    The angle of channel pair i at position p is `p * theta ** (-2i / head_size)`, computed in
    float32 in the order that LLaMA checkpoints were trained with.

    Args:
        positions: How many positions to tabulate.
        head_size: Channels Dh of one head; even.
        theta: The base of the geometric progression of wavelengths.

    Returns:
        `cos` and `sin`, each float32 `[positions, head_size / 2]`.

    Source: Su et al. 2021, arXiv:2104.09864.
    """
    exponent = torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size
    angles = torch.outer(torch.arange(positions).float(), 1.0 / (theta**exponent))
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates channel pairs (i, i + Dh/2) of `x`.

    Shapes: `x` `[B, H, T, Dh]`, `cos` and `sin` `[T, Dh / 2]`; returns `[B, H, T, Dh]`.
    Source: Su et al. 2021, arXiv:2104.09864, in the half-split layout of LLaMA.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
