"""The reference with a KV cache of 8 bits."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lorgnette.export.layers.attention import (
    CachedAttention,
    cached_attention,
    merge_heads,
    split_heads,
)
from lorgnette.export.layers.rope import apply_rope
from lorgnette.quantize.cache import round_cached


def round_cache(layer: CachedAttention, key_scale: Tensor, value_scale: Tensor) -> None:
    """Makes a layer attend from now on to keys and values as a cache of 8 bits holds them.

    Shapes: scales `[Hkv, Dh]`.
    """
    layer.forward = partial(_forward, layer, key_scale, value_scale)  # type: ignore[method-assign]


def _forward(
    layer: CachedAttention,
    key_scale: Tensor,
    value_scale: Tensor,
    x: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    past_length: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `CachedAttention`, but keys are rotated, rounded and turned back before all else."""
    size = key_cache.shape[3]
    widths = [layer.heads * size, layer.kv_heads * size, layer.kv_heads * size]
    q, k, v = torch.split(layer.qkv_proj(x), widths, dim=-1)
    at = past_length.to(torch.int64) + torch.arange(x.shape[1])
    keys = apply_rope(split_heads(k, layer.kv_heads), cos[at], sin[at])
    keys = apply_rope(round_cached(keys, key_scale), cos[at], -sin[at])
    values = round_cached(split_heads(v, layer.kv_heads), value_scale)
    mixed, keys, values = cached_attention(
        torch.cat([q, merge_heads(keys), merge_heads(values)], dim=-1),
        key_cache,
        value_cache,
        cos,
        sin,
        past_length,
        layer.heads,
        layer.kv_heads,
    )
    return layer.o_proj(mixed), keys, values
