"""Matrices multiplied as integers, their inputs rounded to 8 bits position by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lorgnette.errors import ConfigError
from lorgnette.targets.onnx.arguments import Known, graph_value, traced_shape
from lorgnette.targets.onnx.graph import CONTRIB, GraphBuilder

MIDDLE = 128
"""The code that means zero, of weights and of activations."""
MOST = 127
"""Codes of activations lie that far around the middle."""
LEAST_SCALE = 1e-30
"""Scale of positions that are zero, or so near that they are for all purposes."""


def token_matmul(builder: GraphBuilder, weight: str, node: torch.fx.Node, known: Known) -> ir.Value:
    """`x @ weight.T` on integer kernels: a scale for each position of x and each row of `weight`.

    `scale = max|x| / 127` over the channels of a position, `codes = round(x / scale) + 128`, and
    `y = scale * weight_scale * sum((codes - 128) * (weight_codes - 128))`, the sum in int32.

    Both operands are unsigned with a zero point. Kernels that take signed weights add pairs of
    products in 16 bits on processors without dot-product instructions, and saturate there; those
    for unsigned operands are exact on all.

    Source: onnxruntime's operator documentation (MatMulIntegerToFloat); its MLAS, qgemm kernels.

    Raises:
        ConfigError: The scheme is not 8-bit, symmetric and by channel.
    """
    scheme = builder.scheme(weight)
    if scheme.bits != 8 or scheme.group_size or not scheme.symmetric:
        raise ConfigError(
            "integer kernels cannot carry the scheme of a weight",
            where=f"{builder.component.name}/{weight}",
            got=scheme.form,
            wanted="int8c, symmetric",
        )
    rounded, scale = _round_positions(builder, cast("torch.fx.Node", node.args[0]), known)
    codes, weight_scale = builder.channel_weight(weight, scheme)
    middle = builder.constant(np.array(MIDDLE, np.uint8))
    one = builder.constant(np.array(1, np.float32))
    inputs = [rounded, codes, one, weight_scale, middle, middle]
    (product,) = builder.node("MatMulIntegerToFloat", inputs, domain=CONTRIB)
    return builder.node("Mul", [product, scale])[0]


def _round_positions(
    builder: GraphBuilder, x: torch.fx.Node, known: Known
) -> tuple[ir.Value, ir.Value]:
    """Codes of `x`, in its shape, and the scale of each position; made once for all who ask."""
    value = graph_value(builder, known, x)
    shape = [size if isinstance(size, int) else -1 for size in cast("torch.Size", traced_shape(x))]
    if shape.count(-1) > 1:
        raise ConfigError("rows have two dynamic sizes", where=f"{builder.component.name} {x}")
    scale = builder.shared(f"scale of {value.name}", lambda: _scale(builder, value))
    codes = builder.shared(f"codes of {value.name}", lambda: _codes(builder, value, scale, shape))
    return codes, scale


def _scale(builder: GraphBuilder, x: ir.Value) -> ir.Value:
    """The scale of each position. Shapes: `[..., C]` to `[..., 1]`."""
    last = builder.constant(np.array([-1], np.int64))
    (highest,) = builder.node("ReduceMax", [x, last])
    (lowest,) = builder.node("ReduceMin", [x, last])
    (opposite,) = builder.node("Neg", [lowest])
    (largest,) = builder.node("Max", [highest, opposite])
    (scale,) = builder.node("Div", [largest, builder.constant(np.array(MOST, np.float32))])
    return builder.node("Max", [scale, builder.constant(np.array(LEAST_SCALE, np.float32))])[0]


def _codes(builder: GraphBuilder, x: ir.Value, scale: ir.Value, shape: Sequence[int]) -> ir.Value:
    """`round(x / scale) + 128`, as one operator over rows, which reads and writes just once."""
    (rows,) = builder.node("Reshape", [x, _shape(builder, -1, shape[-1])])
    (row_scales,) = builder.node("Reshape", [scale, _shape(builder, -1)])
    (count,) = builder.node("Shape", [row_scales])
    middle = builder.constant(np.array(MIDDLE, np.uint8))
    (middles,) = builder.node("Expand", [middle, count])
    (codes,) = builder.node("QuantizeLinear", [rows, row_scales, middles], {"axis": 0})
    return builder.node("Reshape", [codes, _shape(builder, *shape)])[0]


def _shape(builder: GraphBuilder, *sizes: int) -> ir.Value:
    return builder.constant(np.array(sizes, np.int64))


def without_rounding(model: ir.Model) -> None:
    """Makes every integer multiplication one of float32 with the same weights.

    Before: `codes = ...QuantizeLinear(x)...`, `p = MatMulIntegerToFloat(codes, w, 1, s, z, z)`,
    `y = Mul(p, scale)`.
    After: `matrix = DequantizeLinear(w, s, z)`, `y = FusedMatMul(x, matrix)`.

    The graph stores no matrix twice: each is made from the same codes when it runs, at most all of
    them in float32 at once.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type != "MatMulIntegerToFloat":
            continue
        codes, weight, _, scales, _, middle = node.inputs
        (use,) = node.outputs[0].uses()
        (product,) = use.node.outputs
        float_rows = _source_of(codes)
        columns = ir.Node("", "Shape", [scales], name=f"{node.name}_columns")
        middles = ir.Node("", "Expand", [middle, columns.outputs[0]], name=f"{node.name}_middles")
        matrix = ir.Node(
            "",
            "DequantizeLinear",
            [weight, scales, middles.outputs[0]],
            attributes=[ir.AttrInt64("axis", 1)],
            name=f"{node.name}_matrix",
        )
        # Not MatMul: engines turn that, behind DequantizeLinear, into one that rounds activations.
        operands = [float_rows, matrix.outputs[0]]
        exact = ir.Node(CONTRIB, "FusedMatMul", operands, name=f"{node.name}_exact")
        for made in (columns, middles, matrix, exact):
            made.outputs[0].name = f"{made.name}_0"
        (out,) = exact.outputs
        out.name, out.shape, out.type = product.name, product.shape, product.type
        graph.insert_before(use.node, [columns, middles, matrix, exact])
        product.replace_all_uses_with(out, replace_graph_outputs=True)
        graph.remove([use.node, node], safe=True)
    RemoveUnusedNodesPass()(model)


def _source_of(codes: ir.Value | None) -> ir.Value:
    """What was rounded to `codes`, in the shape of those."""
    found = codes
    for operator in ("Reshape", "QuantizeLinear", "Reshape"):
        made = found.producer() if found is not None else None
        if made is None or made.op_type != operator:
            raise ConfigError("codes are not of rounded activations", got=codes)
        found = made.inputs[0]
    if found is None:
        raise ConfigError("codes are not of rounded activations", got=codes)
    return found
