"""Our modules in the operators that XNNPACK takes, so that few pieces stay outside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorgnette.export.layers.attention import BidirectionalAttention, CachedAttention
from lorgnette.export.layers.decoder import DecoderLayer, LlamaDecoder
from lorgnette.export.layers.mlp import MLP, GatedMLP
from lorgnette.export.layers.norm import RMSNorm
from lorgnette.export.layers.patch_embed import PatchEmbedding, split_patches
from lorgnette.export.layers.projectors import LdpBlock, SqueezeExcite


def mean_weights(width: int) -> Tensor:
    """A matrix whose product with rows is their mean: XNNPACK takes no mean over the last axis."""
    return torch.full((1, width), 1 / width)


class PlainLayerNorm(nn.Module):
    """`nn.LayerNorm` over the last axis, in steps."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        """Takes the numbers of a loaded norm."""
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.mean = nn.Buffer(mean_weights(len(norm.weight)))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises."""
        centred = x - functional.linear(x, self.mean)
        spread = functional.linear(centred * centred, self.mean)
        return centred * torch.rsqrt(spread + self.eps) * self.weight + self.bias


class PlainRMSNorm(nn.Module):
    """`RMSNorm` in steps."""

    def __init__(self, norm: RMSNorm) -> None:
        """Takes the numbers of a loaded norm."""
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps
        self.mean = nn.Buffer(mean_weights(len(norm.weight)))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises."""
        return x * torch.rsqrt(functional.linear(x * x, self.mean) + self.eps) * self.weight


class FloatPatchEmbedding(nn.Module):
    """A `PatchEmbedding` of one tile that turns pixels to floats first: XNNPACK moves no bytes."""

    mean: Tensor
    std: Tensor

    def __init__(self, embed: PatchEmbedding) -> None:
        """Takes its loaded numbers; its positions already hold the class token's value."""
        super().__init__()
        self.patch, self.grid, self.projection = embed.patch, embed.grid, embed.projection
        self.rescale, self.mean, self.std = embed.rescale, embed.mean, embed.std
        self.class_token, position = embed.class_token is not None, embed.position.detach().clone()
        if embed.class_token is not None:
            position[0] += embed.class_token
        self.position = nn.Buffer(position)

    def forward(self, tiles: Tensor) -> Tensor:
        """Embeds the patches of a tile. Shapes: uint8 `[1, 3, edge, edge]` to `[1, P, D]`."""
        patches = split_patches(tiles.to(torch.float32), self.patch, self.grid)
        x = self.projection((patches * self.rescale - self.mean) / self.std)
        if self.class_token:
            x = functional.pad(x, (0, 0, 1, 0))
        return x + self.position  # type: ignore[no-any-return]


class TanhMLP(nn.Module):
    """An `MLP` whose GELU is written out: XNNPACK's own is the exact one, whatever was asked for.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415 (by tanh).
    """

    def __init__(self, mlp: MLP) -> None:
        """Takes its matrices."""
        super().__init__()
        self.fc1, self.fc2 = mlp.fc1, mlp.fc2

    def forward(self, x: Tensor) -> Tensor:
        """Applies the block."""
        x = self.fc1(x)
        inner = (x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)
        return self.fc2(x * 0.5 * (torch.tanh(inner) + 1.0))  # type: ignore[no-any-return]


class PlainAttention(nn.Module):
    """`BidirectionalAttention` of one tile without masks, heads as a batch of matrices."""

    def __init__(self, attention: BidirectionalAttention) -> None:
        """Takes its matrices."""
        super().__init__()
        self.heads = attention.heads
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.out_proj = attention.v_proj, attention.out_proj

    def forward(self, x: Tensor) -> Tensor:
        """Attends over all patches. Shapes: `[1, P, D]` to `[1, P, D]`."""
        _, patches, width = x.shape
        size = width // self.heads

        def split(y: Tensor) -> Tensor:
            return y.reshape(patches, self.heads, size).permute(1, 0, 2)

        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        weights = torch.softmax(torch.bmm(q * size**-0.5, k.permute(0, 2, 1)), dim=-1)
        mixed = torch.bmm(weights, v).permute(1, 0, 2).reshape(1, patches, width)
        return self.out_proj(mixed)  # type: ignore[no-any-return]


class PlainSqueezeExcite(nn.Module):
    """`SqueezeExcite` whose mean over tokens is a product."""

    def __init__(self, gate: SqueezeExcite, tokens: int) -> None:
        """Takes its matrices; `tokens` are those of the map that it scales."""
        super().__init__()
        self.fc1, self.fc2 = gate.fc1, gate.fc2
        self.mean = nn.Buffer(mean_weights(tokens))

    def forward(self, x: Tensor) -> Tensor:
        """Applies the gate. Shapes: `[1, P, C]` to `[1, P, C]`."""
        mean = functional.linear(x.permute(0, 2, 1), self.mean).permute(0, 2, 1)
        inner = torch.relu(self.fc1(mean))
        return x * (torch.clamp(self.fc2(inner) + 3.0, 0.0, 6.0) * (1 / 6))


class SplitLinear(nn.Module):
    """Consecutive rows of one matrix as matrices of their own.

    XNNPACK cuts no tensor whose length is known only at run time.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        """Joins them."""
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Multiplies with each."""
        return [part(x) for part in self.parts]


class StateAttention(nn.Module):
    """`CachedAttention` with a KV cache of its own, by ExecuTorch's operators for it.

    Half rotation is a product with a matrix of 0 and ±1, exact in float32.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, attention: CachedAttention, capacity: int) -> None:
        """Takes its matrices; the cache holds `capacity` positions."""
        super().__init__()
        self.heads, self.kv_heads = attention.heads, attention.kv_heads
        self.qkv_proj, self.o_proj = attention.qkv_proj, attention.o_proj
        self.size = attention.o_proj.in_features // self.heads
        widths = [self.heads * self.size, self.kv_heads * self.size, self.kv_heads * self.size]
        self.splits = {"qkv_proj": widths}
        shape = (1, capacity, self.kv_heads, self.size)
        self.keys = nn.Buffer(torch.zeros(shape))
        self.values = nn.Buffer(torch.zeros(shape))
        half = torch.eye(self.size // 2)
        none = torch.zeros_like(half)
        self.turn = nn.Buffer(torch.cat([torch.cat([none, -half], 1), torch.cat([half, none], 1)]))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, start: int) -> Tensor:
        """Attends `x` `[1, T, D]` at positions from `start` on.

        Shapes: `cos` and `sin` `[1, T, 1, Dh]`.
        """
        q, k, v = self.qkv_proj(x)
        q = q.reshape(1, -1, self.heads, self.size)
        k = k.reshape(1, -1, self.kv_heads, self.size)
        v = v.reshape(1, -1, self.kv_heads, self.size)
        q = q * cos + functional.linear(q, self.turn) * sin
        k = k * cos + functional.linear(k, self.turn) * sin
        ops = torch.ops.llama
        ops.update_cache(k, self.keys, start)
        ops.update_cache(v, self.values, start)
        mixed = ops.custom_sdpa(q, self.keys, self.values, start, None, 0.0, True)
        return self.o_proj(mixed.reshape(1, -1, self.heads * self.size))  # type: ignore[no-any-return]


class SplitGatedMLP(nn.Module):
    """`GatedMLP` whose gate and up are two matrices."""

    def __init__(self, mlp: GatedMLP) -> None:
        """Takes its matrices."""
        super().__init__()
        self.splits = {"gate_up_proj": [mlp.down_proj.in_features] * 2}
        self.gate_up_proj, self.down_proj = mlp.gate_up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        """Applies the block."""
        gate, up = self.gate_up_proj(x)
        return self.down_proj(gate * torch.sigmoid(gate) * up)  # type: ignore[no-any-return]


class StateLayer(nn.Module):
    """`DecoderLayer` around a `StateAttention`."""

    def __init__(self, layer: DecoderLayer, capacity: int) -> None:
        """Takes its parts; the cache holds `capacity` positions."""
        super().__init__()
        self.norm1, self.attention = layer.norm1, StateAttention(layer.attention, capacity)
        self.norm2, self.mlp = layer.norm2, layer.mlp

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, start: int) -> Tensor:
        """Applies the layer to `x` `[1, T, D]`."""
        x = x + self.attention(self.norm1(x), cos, sin, start)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class TextDecoder(nn.Module):
    """`LlamaDecoder` as the stock runner calls it: the KV cache lies inside.

    Shapes: embeddings float32 `[1, T, D]` and the position of the first of them, int64 `[1]`, to
    logits `[1, V]` of the last.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, decoder: LlamaDecoder) -> None:
        """Takes its parts, whose rotary tables are filled."""
        super().__init__()
        self.capacity = len(decoder.cos)
        layers = [StateLayer(each, self.capacity) for each in decoder.layers]  # type: ignore[arg-type]
        self.layers = nn.ModuleList(layers)
        self.norm, self.head = decoder.norm, decoder.head
        self.cos = nn.Buffer(torch.cat([decoder.cos, decoder.cos], 1))
        self.sin = nn.Buffer(torch.cat([decoder.sin, decoder.sin], 1))

    def forward(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        """Runs T positions."""
        length = embeddings.shape[1]
        start = cast("int", positions[0].item())
        torch._check(start >= 0)  # type: ignore[no-untyped-call]
        torch._check(start + length <= self.capacity)  # type: ignore[no-untyped-call]
        torch._check(start < self.capacity)  # type: ignore[no-untyped-call]
        cos = self.cos.narrow(0, start, length).reshape(1, -1, 1, self.cos.shape[1])
        sin = self.sin.narrow(0, start, length).reshape(1, -1, 1, self.sin.shape[1])
        x = embeddings
        for layer in self.layers:
            x = layer(x, cos, sin, start)
        return self.head(self.norm(x[:, -1]))  # type: ignore[no-any-return]


def rewritten(module: nn.Module, *, norms: bool = True) -> nn.Module:
    """A module in the target's operators, around the children that it had.

    Args:
        module: A module as families build it.
        norms: Whether norms are written out, too.
    """
    if isinstance(module, PatchEmbedding):
        return FloatPatchEmbedding(module)
    if isinstance(module, nn.LayerNorm) and norms:
        return PlainLayerNorm(module)
    if isinstance(module, RMSNorm) and norms:
        return PlainRMSNorm(module)
    if isinstance(module, MLP) and module.activation == "gelu_tanh":
        return TanhMLP(module)
    if isinstance(module, BidirectionalAttention):
        return PlainAttention(module)
    if isinstance(module, GatedMLP):
        return SplitGatedMLP(module)
    if isinstance(module, LlamaDecoder):
        return TextDecoder(module)
    if isinstance(module, LdpBlock):
        tokens = (module.grid // module.depthwise.stride[0]) ** 2
        module.gate = PlainSqueezeExcite(module.gate, tokens)  # type: ignore[assignment]
    return module
