"""Feed-forward blocks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]


def activate(x: Tensor, activation: Activation) -> Tensor:
    """One of the GELUs: exact, by tanh, or `x * sigmoid(1.702 x)`.

    Shapes: any.
    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415 (all three).
    """
    if activation == "quick_gelu":
        return x * torch.sigmoid(x * 1.702)
    return functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


class MLP(nn.Module):
    """Two linear layers with biases and a GELU between.

    Shapes: `[..., inputs]` to `[..., outputs]`.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, activation: Activation) -> None:
        """Creates the block with `hidden` inner channels."""
        super().__init__()
        self.activation: Activation = activation
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the block."""
        return self.fc2(activate(self.fc1(x), self.activation))  # type: ignore[no-any-return]


class GatedMLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`, without biases.

    Gate and up are one matrix, gate first: half as many multiplications to start for the same
    numbers.

    Shapes: `[..., D]` to `[..., D]`.
    Source: Shazeer 2020, arXiv:2002.05202.
    """

    def __init__(self, width: int, hidden: int) -> None:
        """Creates the block with `hidden` inner channels."""
        super().__init__()
        self.gate_up_proj = nn.Linear(width, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the block."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(functional.silu(gate) * up)  # type: ignore[no-any-return]
