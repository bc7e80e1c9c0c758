"""Attention, as two operators that stay whole in a traced program.

A target lowers them to its own fused operator, or takes `bidirectional_math` and `cached_math`,
their definitions in plain torch, as decompositions. Both are differentiable nowhere: this package
only runs trained models.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorgnette.export.layers.rope import apply_rope


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`[B, T, H * Dh]` to `[B, H, T, Dh]`."""
    batch, length, width = x.shape
    return x.reshape(batch, length, heads, width // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """`[B, H, T, Dh]` to `[B, T, H * Dh]`."""
    batch, heads, length, size = x.shape
    return x.transpose(1, 2).reshape(batch, length, heads * size)


def bidirectional_math(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Softmax attention of every position to every position.

    Shapes: `q`, `k`, `v` and the result `[B, T, H * Dh]`.
    Source: Vaswani et al. 2017, arXiv:1706.03762.
    """
    out = functional.scaled_dot_product_attention(
        split_heads(q, heads), split_heads(k, heads), split_heads(v, heads)
    )
    return merge_heads(out)


@torch.library.custom_op("lorgnette::bidirectional_attention", mutates_args=())
def bidirectional_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """`bidirectional_math` as one operator."""
    return bidirectional_math(q, k, v, heads).contiguous()


@bidirectional_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    return torch.empty_like(q)


def cached_math(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    past_length: Tensor,
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention of T new positions over a KV cache, with rotary embedding.

    Rotates q and k at positions past_length .. past_length + T - 1, writes k and v there, and
    attends each new position to all positions up to its own. Query head h reads key/value head
    `h // (heads / kv_heads)`.

    Shapes:
        qkv `[B, T, (H + 2 * Hkv) * Dh]`, queries first; caches `[B, Hkv, S, Dh]`;
        cos and sin `[positions, Dh / 2]`; past_length int32 `[1]`.

    Returns:
        The attended values `[B, T, H * Dh]` and the two caches with the new positions written.

    Source: Ainslie et al. 2023, arXiv:2305.13245 (grouped queries).
    """
    capacity, size = key_cache.shape[2:]
    widths = [heads * size, kv_heads * size, kv_heads * size]
    q, k, v = torch.split(qkv, widths, dim=-1)
    at = past_length.to(torch.int64) + torch.arange(qkv.shape[1], device=q.device)
    new_cos, new_sin = cos[at], sin[at]
    query = apply_rope(split_heads(q, heads), new_cos, new_sin)
    keys = key_cache.index_copy(2, at, apply_rope(split_heads(k, kv_heads), new_cos, new_sin))
    values = value_cache.index_copy(2, at, split_heads(v, kv_heads))
    visible = torch.arange(capacity, device=q.device) <= at[:, None]
    out = functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=visible, enable_gqa=heads != kv_heads
    )
    return merge_heads(out), keys, values


@torch.library.custom_op("lorgnette::cached_attention", mutates_args=())
def cached_attention(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    past_length: Tensor,
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`cached_math` as one operator."""
    out, keys, values = cached_math(
        qkv, key_cache, value_cache, cos, sin, past_length, heads, kv_heads
    )
    return out.contiguous(), keys.contiguous(), values.contiguous()


@cached_attention.register_fake
def _(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    past_length: Tensor,
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    width = heads * key_cache.shape[3]
    out = qkv.new_empty(qkv.shape[0], qkv.shape[1], width)
    return out, torch.empty_like(key_cache), torch.empty_like(value_cache)


class BidirectionalAttention(nn.Module):
    """Self-attention of a vision transformer, biases on all four projections.

    Shapes: `[B, P, D]` to `[B, P, D]`.
    """

    def __init__(self, width: int, heads: int) -> None:
        """Creates the projections."""
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attends over all patches."""
        mixed = bidirectional_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads)
        return self.out_proj(mixed)  # type: ignore[no-any-return]


class CachedAttention(nn.Module):
    """Self-attention of a decoder layer: grouped queries, rotary embedding, KV cache.

    Queries, keys and values are one matrix: a third of the multiplications to start.
    """

    def __init__(
        self, width: int, heads: int, kv_heads: int, head_size: int, *, qkv_bias: bool = False
    ) -> None:
        """Creates the projections; the output's never has a bias."""
        super().__init__()
        self.heads = heads
        self.kv_heads = kv_heads
        self.qkv_proj = nn.Linear(width, (heads + 2 * kv_heads) * head_size, bias=qkv_bias)
        self.o_proj = nn.Linear(heads * head_size, width, bias=False)

    def forward(
        self,
        x: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        cos: Tensor,
        sin: Tensor,
        past_length: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attends `x` `[B, T, D]`; shapes of the rest and of the result as in `cached_math`."""
        mixed, keys, values = cached_attention(
            self.qkv_proj(x),
            key_cache,
            value_cache,
            cos,
            sin,
            past_length,
            self.heads,
            self.kv_heads,
        )
        return self.o_proj(mixed), keys, values
