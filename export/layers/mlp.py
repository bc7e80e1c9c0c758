"""Feed-forward blocks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class GeluMLP(nn.Module):
    """Two linear layers with a tanh-approximated GELU between.

    Shapes: `[..., D]` to `[..., D]`.
    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """

    def __init__(self, width: int, hidden: int) -> None:
        """Creates the block with `hidden` inner channels."""
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the block."""
        return self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))  # type: ignore[no-any-return]


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
