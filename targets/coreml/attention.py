"""Attention, without and with a KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from lorgnette.targets.coreml.builder import Cache, FunctionBuilder, Known, graph_value, weight_name
from lorgnette.targets.coreml.mil import Builder, Var, types


def bidirectional_attention(builder: FunctionBuilder, node: torch.fx.Node, known: Known) -> Var:
    """Attention without mask as one operator."""
    heads = cast("int", node.args[3])

    def split(argument: object) -> Var:
        x = graph_value(builder, known, argument)
        batch, length, width = x.shape
        x = Builder.reshape(x=x, shape=[batch, length, heads, width // heads])
        return Builder.transpose(x=x, perm=[0, 2, 1, 3])

    query, key, value = (split(argument) for argument in node.args[:3])
    mixed = Builder.scaled_dot_product_attention(query=query, key=key, value=value)
    return _merge(mixed)


def cached_attention(builder: FunctionBuilder, node: torch.fx.Node, known: Known) -> list[object]:
    """Grouped-query attention with rotary embedding, which writes the cache first.

    The query heads of a group lie in the place of more positions of their key/value head, so that
    the cache is read as it is: Core ML's operator wants as many key heads as query heads, and to
    repeat keys and values would copy the whole cache in every layer of every call.
    """
    qkv, past = graph_value(builder, known, node.args[0]), graph_value(builder, known, node.args[5])
    heads, kv_heads = cast("int", node.args[6]), cast("int", node.args[7])
    key_cache, value_cache = (_cache(known, argument) for argument in node.args[1:3])
    batch, length, width = qkv.shape
    size, grouped = width // (heads + 2 * kv_heads), heads // kv_heads
    x = Builder.reshape(x=qkv, shape=[batch, length, heads + 2 * kv_heads, size])
    x = Builder.transpose(x=x, perm=[0, 2, 1, 3])
    turned, value = Builder.split(x=x, split_sizes=[heads + kv_heads, kv_heads], axis=1)
    cos, sin = (weight_name(builder, known, argument) for argument in node.args[3:5])
    turned = _rotate(builder, turned, past, (cos, sin))
    query, key = Builder.split(x=turned, split_sizes=[heads, kv_heads], axis=1)
    keys = _write(builder, key_cache, key, past)
    values = _write(builder, value_cache, value, past)
    query = Builder.reshape(x=query, shape=[batch, kv_heads, grouped * length, size])
    mixed = Builder.scaled_dot_product_attention(
        query=query, key=keys, value=values, attn_mask=_visible(builder, past, grouped)
    )
    mixed = Builder.reshape(x=mixed, shape=[batch, heads, length, size])
    return [_merge(mixed), key_cache, value_cache]


def _merge(x: Var) -> Var:
    """`[B, H, T, Dh]` to `[B, T, H * Dh]`."""
    batch, heads, length, size = x.shape
    x = Builder.transpose(x=x, perm=[0, 2, 1, 3])
    return Builder.reshape(x=x, shape=[batch, length, heads * size])


def _cache(known: Known, argument: object) -> Cache:
    return cast("Cache", known[cast("torch.fx.Node", argument)])


def _rotate(builder: FunctionBuilder, x: Var, past: Var, tables: tuple[str, str]) -> Var:
    """`x * [cos, cos] + [second half, first half] * [-sin, sin]`, the same as turning pairs.

    Source: Su et al. 2021, arXiv:2104.09864, in the half-split layout of LLaMA.
    """
    first, second = Builder.split(x=x, num_splits=2, axis=3)
    swapped = Builder.concat(values=[second, first], axis=3)
    cos = _table_rows(builder, tables[0], past, sign=1)
    sin = _table_rows(builder, tables[1], past, sign=-1)
    return Builder.add(x=Builder.mul(x=x, y=cos), y=Builder.mul(x=swapped, y=sin))


def _table_rows(builder: FunctionBuilder, name: str, past: Var, *, sign: int) -> Var:
    """The rows of this call's positions; the first half of the columns takes the sign.

    The table has a row for every position of the cache: those that only fill a call up read rows
    of zeros behind the last position of the context.
    """
    rows, half = builder.source.shapes[name]
    shape = (builder.plan.capacity, 2 * half)

    def make() -> NDArray[np.generic]:
        table = builder.source.unrounded(name)
        wide = np.concatenate([sign * table, table], axis=1)
        return np.pad(wide, ((0, shape[0] - rows), (0, 0)))

    def sliced() -> Var:
        table = builder.constant(name, "wide", builder.dtype, shape, make, builder.dtype)
        begin = Builder.concat(values=[past, np.zeros(1, np.int32)], axis=0)
        size = np.array([builder.plan.rows, shape[1]], np.int32)
        return Builder.slice_by_size(x=table, begin=begin, size=size)

    return builder.shared(f"rows of {name}", sliced)


def _write(builder: FunctionBuilder, cache: Cache, new: Var, past: Var) -> Var:
    """Puts the new positions behind the past ones; returns the whole cache."""
    held = builder.caches[cache.index]
    is_state = types.is_state(held.sym_type)
    before = Builder.read_state(input=held) if is_state else held
    batch, heads, _, size = before.shape
    begin = builder.shared("cache begin", lambda: _corner(past, (0, 0), 0))
    end_at = builder.shared(
        "cache end at", lambda: Builder.add(x=past, y=np.array([builder.plan.rows], np.int32))
    )
    end = builder.shared("cache end", lambda: _corner(end_at, (batch, heads), size))
    after = Builder.slice_update(x=before, update=new, begin=begin, end=end)
    if is_state:
        return Builder.coreml_update_state(state=held, value=after)
    builder.updated[cache.index] = after
    return after


def _corner(position: Var, before: tuple[int, int], behind: int) -> Var:
    values = [np.array(before, np.int32), position, np.array([behind], np.int32)]
    return Builder.concat(values=values, axis=0)


def _visible(builder: FunctionBuilder, past: Var, grouped: int) -> Var:
    """Which positions of the cache each query sees: all up to its own.

    Shapes: bool `[grouped * T, S]`, the positions of one head after those of another.
    """

    def make() -> Var:
        own = np.tile(np.arange(builder.plan.rows, dtype=np.int32), grouped)[:, None]
        positions = Builder.add(x=past, y=own)
        every = np.arange(builder.plan.capacity, dtype=np.int32)[None]
        return Builder.less_equal(x=every, y=positions)

    return builder.shared(f"visible {grouped}", make)


ATTENTION: dict[str, Callable[[FunctionBuilder, torch.fx.Node, Known], object]] = {
    "lorgnette.bidirectional_attention.default": bidirectional_attention,
    "lorgnette.cached_attention.default": cached_attention,
}
