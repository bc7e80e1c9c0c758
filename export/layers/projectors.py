"""Projectors: vision features to decoder width."""

from __future__ import annotations

from torch import Tensor, nn


def pixel_shuffle(x: Tensor, grid: int, scale: int) -> Tensor:
    """Folds each `scale` x `scale` block of patches into channels.

    Channel `(row_in_block * scale + col_in_block) * D + d` of an output position is channel d of
    that patch; output positions are row-major. Never more than four axes.

    Shapes: `[B, grid * grid, D]` to `[B, (grid / scale) ** 2, D * scale ** 2]`.
    Source: Laurençon et al. 2024, arXiv:2408.12637 (Idefics3).
    """
    batch, _, width = x.shape
    small = grid // scale
    x = x.reshape(batch, grid, small, width * scale).permute(0, 2, 1, 3)
    x = x.reshape(batch, small, small, width * scale * scale).permute(0, 2, 1, 3)
    return x.reshape(batch, small * small, width * scale * scale)


class PixelShuffleProjector(nn.Module):
    """Pixel shuffle and one linear layer without bias (SmolVLM's connector).

    Shapes: `[B, grid * grid, D_vision]` to `[B, N, D_text]`.
    """

    def __init__(self, vision_width: int, text_width: int, grid: int, scale: int) -> None:
        """Creates the projection of `scale` x `scale` blocks."""
        super().__init__()
        self.grid = grid
        self.scale = scale
        self.projection = nn.Linear(vision_width * scale * scale, text_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Projects the features of each tile."""
        return self.projection(pixel_shuffle(x, self.grid, self.scale))  # type: ignore[no-any-return]
