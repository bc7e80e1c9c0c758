"""Attention over a KV cache, of float32 or of 8 bits."""

from __future__ import annotations

from typing import cast

import numpy as np
import onnx_ir as ir
import torch

from lorgnette.targets.onnx.arguments import Known, graph_value
from lorgnette.targets.onnx.graph import CONTRIB, Attribute, GraphBuilder


def cached_attention(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> list[ir.Value]:
    """Grouped-query attention with rotary embedding, writing the bound cache in place.

    A cache of int8 is rounded as it is written, with one step for each channel of each head.
    """
    qkv, key_cache, value_cache, cos, sin, past = (
        graph_value(builder, known, argument) for argument in node.args[:6]
    )
    total = builder.shared("total_length", lambda: _total_length(builder, past))
    last = builder.shared(
        "last_position",
        lambda: builder.node("Sub", [total, builder.constant(np.array([1], np.int32))])[0],
    )
    attributes: dict[str, Attribute] = {
        "num_heads": cast("int", node.args[6]),
        "kv_num_heads": cast("int", node.args[7]),
        "do_rotary": 1,
    }
    inputs: list[ir.Value | None] = [qkv, None, None, key_cache, value_cache, last, total, cos, sin]
    if key_cache.dtype == ir.DataType.INT8:
        scales = [builder.cache_scale(str(c.name).removesuffix("_in")) for c in inputs[3:5] if c]
        # No positions, bias or sinks.
        inputs += [None, None, None, *scales]
        attributes |= {
            "k_quant_type": "PER_CHANNEL",
            "v_quant_type": "PER_CHANNEL",
            "kv_cache_bit_width": 8,
        }
    return builder.node("GroupQueryAttention", inputs, attributes, domain=CONTRIB, outputs=3)


def _total_length(builder: GraphBuilder, past: ir.Value) -> ir.Value:
    (length,) = builder.node("Shape", [builder.inputs[0]], {"start": 1, "end": 2})
    (length,) = builder.node("Cast", [length], {"to": int(ir.DataType.INT32)})
    return builder.node("Add", [past, length])[0]


def with_float_cache(model: ir.Model) -> None:
    """Makes a KV cache of 8 bits one of float32.

    Before: `GroupQueryAttention(qkv, , , k, v, last, total, cos, sin, , , , ks, vs)`, k and v int8.
    After: `GroupQueryAttention(qkv, , , k, v, last, total, cos, sin)`, k and v float32.
    """
    float32 = ir.TensorType(ir.DataType.FLOAT)
    for node in model.graph:
        if "kv_cache_bit_width" not in node.attributes:
            continue
        for name in ("k_quant_type", "v_quant_type", "kv_cache_bit_width"):
            del node.attributes[name]
        scales = node.inputs[12:14]
        node.resize_inputs(9)
        for scale in scales:
            if scale is not None and not scale.uses():
                del model.graph.initializers[str(scale.name)]
        for cached in (*node.inputs[3:5], *node.outputs[1:3]):
            if cached is not None:
                cached.type = float32
