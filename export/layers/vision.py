"""The SigLIP vision transformer."""

from __future__ import annotations

from torch import Tensor, nn

from lorgnette.export.layers.attention import BidirectionalAttention
from lorgnette.export.layers.mlp import GeluMLP
from lorgnette.export.layers.patch_embed import PatchEmbedding
from lorgnette.spec import VisionSpec


class VisionLayer(nn.Module):
    """A pre-norm transformer layer. Shapes: `[G, P, D]` to `[G, P, D]`."""

    def __init__(self, spec: VisionSpec) -> None:
        """Creates the layer from the numbers of the tower."""
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.hidden_size, eps=spec.norm_eps)
        self.attention = BidirectionalAttention(spec.hidden_size, spec.heads)
        self.norm2 = nn.LayerNorm(spec.hidden_size, eps=spec.norm_eps)
        self.mlp = GeluMLP(spec.hidden_size, spec.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """Applies attention and feed-forward, each with a residual."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class SiglipTower(nn.Module):
    """Tiles to patch features, final norm applied.

    Position ids are the identity: every tile is full, so patch p has position p.

    Shapes: uint8 `[G, 3, edge, edge]` to `[G, P, D]`.
    Source: Zhai et al. 2023, arXiv:2303.15343.
    """

    def __init__(self, spec: VisionSpec) -> None:
        """Creates the tower."""
        super().__init__()
        self.embed = PatchEmbedding(spec.hidden_size, spec.patch_size, spec.grid)
        self.layers = nn.ModuleList(VisionLayer(spec) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(spec.hidden_size, eps=spec.norm_eps)

    def forward(self, tiles: Tensor) -> Tensor:
        """Encodes a batch of tiles."""
        x = self.embed(tiles)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)  # type: ignore[no-any-return]
