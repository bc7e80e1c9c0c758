"""Projectors: vision features to decoder width."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from lorgnette.export.layers.mlp import MLP
from lorgnette.export.weights import Flatten, Rule


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


def to_map(x: Tensor, grid: int) -> Tensor:
    """Row-major tokens as a picture. Shapes: `[B, grid * grid, C]` to `[B, C, grid, grid]`."""
    batch, _, width = x.shape
    return x.permute(0, 2, 1).reshape(batch, width, grid, grid)


def to_tokens(x: Tensor) -> Tensor:
    """The way back. Shapes: `[B, C, grid, grid]` to `[B, grid * grid, C]`."""
    batch, width, rows, columns = x.shape
    return x.reshape(batch, width, rows * columns).permute(0, 2, 1)


def depthwise(width: int, *, stride: int, bias: bool) -> nn.Conv2d:
    """A 3 x 3 convolution of every channel by itself, with a border of one zero."""
    return nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=width, bias=bias)


def squeezed_width(width: int) -> int:
    """Inner channels of a squeeze-excite block: a quarter, rounded to a multiple of 8.

    Rounding down never loses more than a tenth.

    Source: Howard et al. 2019, arXiv:1905.02244 (MobileNetV3), as torchvision rounds.
    """
    quarter = width // 4
    rounded = max(8, (quarter + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * quarter else rounded


class SqueezeExcite(nn.Module):
    """Scales every channel by a gate computed from the mean of all tokens.

    Shapes: `[B, P, C]` to `[B, P, C]`.
    Source: Hu et al. 2018, arXiv:1709.01507, with the hard sigmoid of MobileNetV3.
    """

    def __init__(self, width: int) -> None:
        """Creates the two layers of the gate."""
        super().__init__()
        self.fc1 = nn.Linear(width, squeezed_width(width))
        self.fc2 = nn.Linear(squeezed_width(width), width)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the gate."""
        inner = functional.relu(self.fc1(x.mean(dim=1, keepdim=True)))
        return x * functional.hardsigmoid(self.fc2(inner))


class LdpBlock(nn.Module):
    """MobileNetV3's inverted residual without expansion, layer norms in place of batch norms.

    Depthwise convolution, norm, hard swish, squeeze-excite, pointwise layer, norm; with stride 1
    plus the input.

    Shapes: `[B, grid * grid, C]` to `[B, (grid / stride) ** 2, C]`.
    Source: Chu et al. 2023, arXiv:2312.16886 (MobileVLM).
    """

    def __init__(self, width: int, grid: int, stride: int) -> None:
        """Creates the block; `grid` is a multiple of `stride`, 1 or 2."""
        super().__init__()
        self.grid = grid
        self.residual = stride == 1
        self.depthwise = depthwise(width, stride=stride, bias=False)
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.gate = SqueezeExcite(width)
        self.pointwise = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the block."""
        y = to_tokens(self.depthwise(to_map(x, self.grid)))
        y = self.gate(functional.hardswish(self.norm1(y)))
        y = self.norm2(self.pointwise(y))
        return x + y if self.residual else y  # type: ignore[no-any-return]


class LdpProjector(nn.Module):
    """The lightweight downsample projector of MobileVLM: half the grid in each direction.

    Shapes: `[B, grid * grid, D_vision]` to `[B, (grid / 2) ** 2, D_text]`.
    Source: Chu et al. 2023, arXiv:2312.16886.
    """

    def __init__(self, vision_width: int, width: int, grid: int) -> None:
        """Creates the projector of an even grid."""
        super().__init__()
        self.mlp = MLP(vision_width, width, width, "gelu")
        self.block1 = LdpBlock(width, grid, stride=1)
        self.block2 = LdpBlock(width, grid, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Projects the features of each tile."""
        return self.block2(self.block1(self.mlp(x)))  # type: ignore[no-any-return]


class LdpV2Projector(nn.Module):
    """The projector of MobileVLM V2: means of 2 x 2 tokens, positions by a convolution.

    Shapes: `[B, grid * grid, D_vision]` to `[B, (grid / 2) ** 2, D_text]`.
    Source: Chu et al. 2024, arXiv:2402.03766.
    """

    def __init__(self, vision_width: int, width: int, grid: int) -> None:
        """Creates the projector of an even grid."""
        super().__init__()
        self.grid = grid
        self.mlp = MLP(vision_width, width, width, "gelu")
        self.depthwise = depthwise(width, stride=1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Projects the features of each tile."""
        pooled = functional.avg_pool2d(to_map(self.mlp(x), self.grid), 2)
        return to_tokens(pooled + self.depthwise(pooled))


class ConcatProjector(nn.Module):
    """Joins consecutive tokens to one, then two linear layers (OmniVLM).

    Consecutive in row-major order, so a part of a row of patches and no square of them.

    Shapes: `[B, P, D_vision]` to `[B, P / patches_per_token, D_text]`.
    Source: Chen et al. 2024, arXiv:2412.11475.
    """

    def __init__(self, vision_width: int, hidden: int, width: int, patches_per_token: int) -> None:
        """Creates the projector; `patches_per_token` divides P, and 1 joins nothing."""
        super().__init__()
        self.patches_per_token = patches_per_token
        self.mlp = MLP(vision_width * patches_per_token, hidden, width, "gelu_tanh")

    def forward(self, x: Tensor) -> Tensor:
        """Projects the features of each tile."""
        batch, patches, width = x.shape
        joined = self.patches_per_token
        if joined > 1:
            x = x.reshape(batch, patches // joined, width * joined)
        return self.mlp(x)  # type: ignore[no-any-return]


def ldp_rules(prefix: str, width: int) -> dict[str, Rule]:
    """Where an `LdpProjector` called `projector` finds its weights.

    Args:
        prefix: What precedes `model.mlp...`, dot included.
        width: Its width D_text.
    """
    rules: dict[str, Rule] = {
        "projector.mlp.fc1": f"{prefix}model.mlp.1",
        "projector.mlp.fc2": f"{prefix}model.mlp.3",
    }
    inner = squeezed_width(width)
    for number in (1, 2):
        ours, published = f"projector.block{number}.", f"{prefix}model.mb_block.{number}.block."
        rules |= {
            f"{ours}depthwise": f"{published}0.0",
            f"{ours}norm1": f"{published}0.1",
            f"{ours}gate.fc1": f"{published}1.fc1",
            f"{ours}gate.fc1.weight": Flatten(f"{published}1.fc1.weight", (inner, width, 1, 1)),
            f"{ours}gate.fc2": f"{published}1.fc2",
            f"{ours}gate.fc2.weight": Flatten(f"{published}1.fc2.weight", (width, inner, 1, 1)),
            f"{ours}pointwise.weight": Flatten(f"{published}2.0.weight", (width, width, 1, 1)),
            f"{ours}norm2": f"{published}2.1",
        }
    return rules


def ldpv2_rules(prefix: str) -> dict[str, Rule]:
    """Where an `LdpV2Projector` called `projector` finds its weights.

    Args:
        prefix: What precedes `mlp.mlp...`, dot included.
    """
    return {
        "projector.mlp.fc1": f"{prefix}mlp.mlp.0",
        "projector.mlp.fc2": f"{prefix}mlp.mlp.2",
        "projector.depthwise": f"{prefix}peg.peg.0",
    }


def concat_rules(prefix: str) -> dict[str, Rule]:
    """Where a `ConcatProjector` called `projector` finds its weights.

    Args:
        prefix: What precedes `0.weight`, dot included.
    """
    return {"projector.mlp.fc1": f"{prefix}0", "projector.mlp.fc2": f"{prefix}2"}
