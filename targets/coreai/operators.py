"""Operators of this target alone, and what replaces those of the package in a traced program.

A stored matrix is no parameter of a traced module: an operator names it, and its constant is made
when the program is converted. So one matrix at a time is in memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lorgnette.export.layers.attention import bidirectional_math, merge_heads, split_heads
from lorgnette.export.layers.rope import apply_rope

NAMESPACE = "lorgnette_coreai"


@torch.library.custom_op(f"{NAMESPACE}::stored_linear", mutates_args=())
def stored_linear(x: Tensor, matrix: str, rows: int) -> Tensor:
    """`x` times a stored matrix, transposed. Shapes: `[..., columns]` to `[..., rows]`."""
    raise NotImplementedError("a stored matrix is known only to the converter")


@stored_linear.register_fake
def _(x: Tensor, matrix: str, rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.custom_op(f"{NAMESPACE}::stored_rows", mutates_args=())
def stored_rows(token_ids: Tensor, matrix: str, part: str, width: int) -> Tensor:
    """Rows of a part of a stored table: `values`, `codes`, `scales` or `zero_points`.

    Shapes: `[1, T]` to float32 `[1, T, width]`.
    """
    raise NotImplementedError("a stored table is known only to the converter")


@stored_rows.register_fake
def _(token_ids: Tensor, matrix: str, part: str, width: int) -> Tensor:
    return token_ids.new_empty(*token_ids.shape, width, dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::write_positions", mutates_args=())
def write_positions(cache: Tensor, new: Tensor, past_length: Tensor) -> Tensor:
    """The cache with new positions written behind the past ones.

    Shapes: `[1, Hkv, S, Dh]`, `[1, Hkv, T, Dh]` and int32 `[1]`.
    """
    at = past_length.to(torch.int64) + torch.arange(new.shape[2])
    return cache.index_copy(2, at, new)


@write_positions.register_fake
def _(cache: Tensor, new: Tensor, past_length: Tensor) -> Tensor:
    return torch.empty_like(cache)


@torch.library.custom_op(f"{NAMESPACE}::attend", mutates_args=())
def attend(query: Tensor, keys: Tensor, values: Tensor, past_length: Tensor) -> Tensor:
    """Causal attention of new positions to the filled ones of a cache.

    Shapes: `[1, H, T, Dh]`, caches `[1, Hkv, S, Dh]`, int32 `[1]`; returns `[1, H, T, Dh]`.
    """
    raise NotImplementedError("known only to the converter")


@attend.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, past_length: Tensor) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _cached(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cos: Tensor,
    sin: Tensor,
    past_length: Tensor,
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`cached_math` in operators that the converter is told of.

    It knows neither a scatter nor a slice of a length that is found at run time.
    """
    size = key_cache.shape[3]
    q, k, v = torch.split(qkv, [heads * size, kv_heads * size, kv_heads * size], dim=-1)
    at = past_length.to(torch.int64) + torch.arange(qkv.shape[1], device=qkv.device)
    new_cos, new_sin = cos[at], sin[at]
    query = apply_rope(split_heads(q, heads), new_cos, new_sin)
    key = apply_rope(split_heads(k, kv_heads), new_cos, new_sin)
    keys = write_positions(key_cache, key, past_length)
    values = write_positions(value_cache, split_heads(v, kv_heads), past_length)
    out = attend(query, keys, values, past_length)
    return merge_heads(out), keys, values


def decompositions() -> dict[torch._ops.OperatorBase, Callable[..., object]]:
    """The converter's decompositions, and the two attentions as what it knows."""
    from lorgnette.targets.coreai.library import coreai_torch

    table: dict[torch._ops.OperatorBase, Callable[..., object]] = coreai_torch.get_decomp_table()
    table.pop(torch.ops.aten.rms_norm.default, None)  # stays whole, as the converter's norms do
    table[torch.ops.lorgnette.bidirectional_attention.default] = bidirectional_math
    table[torch.ops.lorgnette.cached_attention.default] = _cached
    return table
