"""From uint8 tiles to patch vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def split_patches(tiles: Tensor, patch: int, grid: int) -> Tensor:
    """Cuts tiles to flattened patches, dropping the border that fills no patch.

    Never more than five axes, the limit of Core ML. Channels within a patch are ordered
    (colour, row, column), as a convolution kernel is.

    Shapes: `[G, 3, edge, edge]` to `[G, grid * grid, 3 * patch * patch]`.
    """
    count = tiles.shape[0]
    side = grid * patch
    x = tiles[:, :, :side, :side].reshape(count, 3, grid, patch, side)
    x = x.permute(0, 2, 1, 3, 4).reshape(count * grid, 3 * patch, grid, patch)
    return x.permute(0, 2, 1, 3).reshape(count, grid * grid, 3 * patch * patch)


class PatchEmbedding(nn.Module):
    """Normalises uint8 tiles and projects every patch, plus a learned position.

    Pixels become `(value * rescale - mean) / std`; the convolution with stride = kernel is a
    linear layer over patches. A class token, where there is one, stands first and has a position
    of its own.

    Shapes: uint8 `[G, 3, edge, edge]` to `[G, P, D]`, with a class token `[G, P + 1, D]`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, width: int, patch: int, grid: int, *, bias: bool = True, class_token: bool = False
    ) -> None:
        """Creates the layer for a grid of `grid` x `grid` patches of `patch` pixels."""
        super().__init__()
        self.patch = patch
        self.grid = grid
        self.projection = nn.Linear(3 * patch * patch, width, bias=bias)
        self.class_token = nn.Parameter(torch.empty(width)) if class_token else None
        self.position = nn.Parameter(torch.empty(grid * grid + class_token, width))
        # Per input channel of `projection`, so that the border case of mixed means is exact.
        self.rescale = nn.Buffer(torch.empty(1))
        self.mean = nn.Buffer(torch.empty(3 * patch * patch))
        self.std = nn.Buffer(torch.empty(3 * patch * patch))

    def forward(self, tiles: Tensor) -> Tensor:
        """Embeds the patches of every tile."""
        patches = split_patches(tiles, self.patch, self.grid).to(torch.float32)
        x = self.projection((patches * self.rescale - self.mean) / self.std)
        if self.class_token is None:
            return x + self.position  # type: ignore[no-any-return]
        # A row of zeros in front that the class token is added to, as its position is: repeating
        # the token for every tile would be a shape known only at run time.
        first = functional.pad(self.class_token[None], (0, 0, 0, self.grid * self.grid))
        return functional.pad(x, (0, 0, 1, 0)) + (self.position + first)
