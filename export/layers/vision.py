"""The SigLIP and CLIP vision transformers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorgnette.export.layers.attention import BidirectionalAttention
from lorgnette.export.layers.mlp import MLP, Activation
from lorgnette.export.layers.patch_embed import PatchEmbedding
from lorgnette.export.layers.stages import DropFirst, Site, Stage, plain_site, run_stages
from lorgnette.export.weights import Computed, Flatten, Rule
from lorgnette.spec import VisionSpec


class VisionLayer(nn.Module):
    """A pre-norm transformer layer. Shapes: `[G, P, D]` to `[G, P, D]`."""

    def __init__(self, spec: VisionSpec, activation: Activation) -> None:
        """Creates the layer from the numbers of the tower."""
        super().__init__()
        width = spec.hidden_size
        self.norm1 = nn.LayerNorm(width, eps=spec.norm_eps)
        self.attention = BidirectionalAttention(width, spec.heads)
        self.norm2 = nn.LayerNorm(width, eps=spec.norm_eps)
        self.mlp = MLP(width, spec.intermediate_size, width, activation)

    def forward(self, x: Tensor) -> Tensor:
        """Applies attention and feed-forward, each with a residual."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]

    def sites(self) -> tuple[Site, ...]:
        """From each norm to the matrices behind it, and from values to the output projection.

        Attention weighs values channel by channel; a GELU lies between the two matrices of the
        feed-forward, which therefore are no site.
        """
        width = self.attention.q_proj.in_features
        heads = tuple(f"attention.{name}_proj.weight" for name in "qkv")
        values = ("attention.v_proj.weight", "attention.v_proj.bias")
        return (
            plain_site("norm1", ("norm1.weight", "norm1.bias"), heads, width),
            plain_site("values", values, ("attention.out_proj.weight",), width),
            plain_site("norm2", ("norm2.weight", "norm2.bias"), ("mlp.fc1.weight",), width),
        )


def _layer_stages(layers: nn.ModuleList) -> list[Stage]:
    return [Stage(f"layers.{index}.", layer) for index, layer in enumerate(layers)]


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
        self.layers = nn.ModuleList(VisionLayer(spec, "gelu_tanh") for _ in range(spec.layers))
        self.norm = nn.LayerNorm(spec.hidden_size, eps=spec.norm_eps)

    def forward(self, tiles: Tensor) -> Tensor:
        """Encodes a batch of tiles."""
        return run_stages(self.stages(), tiles)

    def stages(self) -> list[Stage]:
        """What runs, in order."""
        layers = _layer_stages(self.layers)
        return [Stage("embed.", self.embed), *layers, Stage("norm.", self.norm)]


class ClipTower(nn.Module):
    """Tiles to patch features as they leave the last layer given: no final norm, no class token.

    `spec.layers` are the layers that run. A model that takes the features of the last layer but
    one is given one layer less than was published.

    Shapes: uint8 `[G, 3, edge, edge]` to `[G, P, D]`.
    Source: Radford et al. 2021, arXiv:2103.00020.
    """

    def __init__(self, spec: VisionSpec) -> None:
        """Creates the tower."""
        super().__init__()
        self.embed = PatchEmbedding(
            spec.hidden_size, spec.patch_size, spec.grid, bias=False, class_token=True
        )
        self.pre_norm = nn.LayerNorm(spec.hidden_size, eps=spec.norm_eps)
        self.layers = nn.ModuleList(VisionLayer(spec, "quick_gelu") for _ in range(spec.layers))
        self.patches = DropFirst()

    def forward(self, tiles: Tensor) -> Tensor:
        """Encodes a batch of tiles."""
        return run_stages(self.stages(), tiles)

    def stages(self) -> list[Stage]:
        """What runs, in order."""
        first = [Stage("embed.", self.embed), Stage("pre_norm.", self.pre_norm)]
        return [*first, *_layer_stages(self.layers), Stage("", self.patches)]


def siglip_rules(
    prefix: str,
    spec: VisionSpec,
    *,
    rescale: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, Rule]:
    """Where a `SiglipTower` called `tower` finds its weights.

    Args:
        prefix: What precedes `embeddings...`, dot included.
        spec: The numbers of the tower.
        rescale: What a byte is multiplied with to become a pixel value.
        mean: Subtracted from it, one for each colour.
        std: Divided by then, one for each colour.
    """
    return {
        **_pixel_rules(spec.patch_size, rescale, mean, std),
        **_transformer_rules(prefix, spec),
        "tower.embed.projection": f"{prefix}embeddings.patch_embedding",
        "tower.norm": f"{prefix}post_layernorm",
    }


def clip_rules(
    prefix: str,
    spec: VisionSpec,
    *,
    rescale: float,
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, Rule]:
    """Where a `ClipTower` called `tower` finds its weights; arguments as of `siglip_rules`.

    Published layers behind the last that runs, and the final norm, have no rule.
    """
    return {
        **_pixel_rules(spec.patch_size, rescale, mean, std),
        **_transformer_rules(prefix, spec),
        "tower.embed.class_token": f"{prefix}embeddings.class_embedding",
        "tower.pre_norm": f"{prefix}pre_layrnorm",  # published so
    }


def _pixel_rules(
    patch: int, rescale: float, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Rule]:
    per_colour = patch * patch
    return {
        "tower.embed.rescale": Computed(lambda: torch.tensor([rescale])),
        "tower.embed.mean": Computed(lambda: torch.tensor(mean).repeat_interleave(per_colour)),
        "tower.embed.std": Computed(lambda: torch.tensor(std).repeat_interleave(per_colour)),
    }


def _transformer_rules(prefix: str, spec: VisionSpec) -> dict[str, Rule]:
    kernel = (spec.hidden_size, 3, spec.patch_size, spec.patch_size)
    layer = f"{prefix}encoder.layers.{{i}}."
    return {
        "tower.embed.projection.weight": Flatten(
            f"{prefix}embeddings.patch_embedding.weight", kernel
        ),
        "tower.embed.position": f"{prefix}embeddings.position_embedding.weight",
        "tower.layers.{i}.norm1": f"{layer}layer_norm1",
        "tower.layers.{i}.attention.q_proj": f"{layer}self_attn.q_proj",
        "tower.layers.{i}.attention.k_proj": f"{layer}self_attn.k_proj",
        "tower.layers.{i}.attention.v_proj": f"{layer}self_attn.v_proj",
        "tower.layers.{i}.attention.out_proj": f"{layer}self_attn.out_proj",
        "tower.layers.{i}.norm2": f"{layer}layer_norm2",
        "tower.layers.{i}.mlp.fc1": f"{layer}mlp.fc1",
        "tower.layers.{i}.mlp.fc2": f"{layer}mlp.fc2",
    }
