"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class RMSNorm(nn.Module):
    """Root mean square normalisation: `x / sqrt(mean(x^2) + eps) * weight`.

    Shapes: `[..., D]` to `[..., D]`.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """

    def __init__(self, width: int, eps: float) -> None:
        """Creates the layer for `width` channels."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises over the last axis."""
        return functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
