"""Composite operators: an engine takes them whole, or as the graph that defines them."""

from __future__ import annotations

import math

import numpy as np
from coreai._compiler.ir import RankedTensorType, Value

from lorgnette.targets.coreai.constants import tensor_type
from lorgnette.targets.coreai.library import core, coreai_torch

MASKED = -1e30
"""The score of a position that must not be seen: its weight is exactly 0."""


def cached_attention(query: Value, keys: Value, values: Value, past_length: Value) -> Value:
    """Causal attention of T new positions to those of a cache that are filled.

    What lies behind them is not read, so that a large cache costs no more than a small one.

    Shapes: `[1, H, T, Dh]`, caches `[1, Hkv, S, Dh]`, int32 `[1]`; returns `[1, H, T, Dh]`.
    """
    new = core.cast(core.slice_(core.get_shape(query), [2], [3], [1]), np.int32)
    end = core.broadcasting_add(past_length, new)
    seen, rows = (core.range_(0, core.reshape(stop, []), 1) for stop in (end, new))
    at = core.expand_dims(core.broadcasting_add(past_length, rows), [1])
    hidden = core.broadcasting_greater(core.expand_dims(seen, [0]), at)
    filled_keys, filled_values = _first_positions(keys, end), _first_positions(values, end)
    return _attention(query, filled_keys, filled_values, core.not_(hidden))


def _first_positions(cache: Value, end: Value) -> Value:
    held = tensor_type(cache)
    batch, heads, _, size = held.shape
    kept = RankedTensorType.get(
        [batch, heads, RankedTensorType.get_dynamic_size(), size], held.element_type
    )
    stop = core.concat(0, [[batch], [heads], end, [size]])
    start, step = core.constant([0, 0, 0, 0]), core.constant([1, 1, 1, 1])
    found: Value = core.SliceOp(  # type: ignore[no-untyped-call]
        cache, start, stop, step, results=[kept]
    ).result
    return found


def _attention(query: Value, keys: Value, values: Value, visible: Value) -> Value:
    """The library's composite operator, which also groups queries.

    Its definition here lets the queries of a group stand in one matrix, where the library's would
    repeat keys and values for each of them.

    Shapes: as above, `visible` bool `[T, filled]`.
    """
    attributes = {"is_causal": False, "window_size": 0, "version": 1}
    names = ["query", "key", "value", "attn_mask"]
    declared = coreai_torch.generate_composite_decl(
        query.context, "scaled_dot_product_attention", names, ["output"], attributes
    )
    _, heads, _, size = tensor_type(query).shape
    kv_heads = tensor_type(keys).shape[1]

    @core.graph(private=True, no_inline=True, composite_decl=declared)
    def sdpa(q: Value, k: Value, v: Value, mask: Value) -> Value:
        new = core.cast(core.slice_(core.get_shape(q), [2], [3], [1]), np.int32)
        seen = core.cast(core.slice_(core.get_shape(k), [2], [3], [1]), np.int32)
        together = core.broadcasting_mul(new, core.constant([heads // kv_heads]))
        scaled = core.broadcasting_mul(q, core.constant(1 / math.sqrt(size)))
        groups = core.reshape(scaled, core.concat(0, [[1], [kv_heads], together, [size]]))
        scores = core.broadcasting_batch_matmul(
            groups, core.transpose(k, np.array([0, 1, 3, 2], np.uint32))
        )
        apart = core.concat(0, [[1], [kv_heads], [heads // kv_heads], new, seen])
        masked = core.broadcasting_where(mask, core.reshape(scores, apart), core.constant(MASKED))
        weights = core.reshape(
            core.softmax(masked, 4), core.concat(0, [[1], [kv_heads], together, seen])
        )
        mixed = core.broadcasting_batch_matmul(weights, v)
        shape = core.concat(0, [[1], [heads], new, [size]])
        out: Value = core.ReshapeOp(  # type: ignore[no-untyped-call]
            mixed, shape, results=[q.type]
        ).result
        return out

    found: Value = sdpa(query, keys, values, visible)[0]
    return found


def rms_norm(x: Value, weight: Value, eps: float) -> Value:
    """Root mean square normalisation over the last axis, called as the library's own is.

    Shapes: `[..., D]` and `[D]` to `[..., D]`.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    attributes = {"eps": eps, "axes": -1, "version": 1}
    declared = coreai_torch.generate_composite_decl(
        x.context, "rms_norm", ["input", "scale"], ["output"], attributes
    )

    @core.graph(private=True, no_inline=True, composite_decl=declared)
    def rms_norm(value: Value, scale: Value) -> Value:
        last = [len(tensor_type(value).shape) - 1]
        mean = core.reduce_mean(core.broadcasting_mul(value, value), last)
        inverse = core.rsqrt(core.broadcasting_add(mean, core.constant(eps)))
        return core.broadcasting_mul(core.broadcasting_mul(value, inverse), scale)

    found: Value = rms_norm(x, weight)[0]
    return found
