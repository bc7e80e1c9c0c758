"""Multiplications of hundreds of positions: codes of 4 bits recoded for integer kernels."""

from __future__ import annotations

from functools import partial
from typing import cast

import numpy as np
import onnx_ir as ir
import torch

from lorgnette.quantize.scheme import QuantScheme
from lorgnette.targets.onnx.arguments import Known, graph_value, traced_shape
from lorgnette.targets.onnx.graph import CONTRIB, GraphBuilder
from lorgnette.targets.onnx.integer_matmul import LEAST_SCALE, MIDDLE, round_positions

MOST = 64
"""Codes by row lie that far around zero: two products with bytes then fit 16 bits, in which
kernels for processors without dot-product instructions add them."""


def is_recoded(scheme: QuantScheme) -> bool:
    """Whether a matrix of the scheme is recoded: codes of 4 bits, which those by row resolve."""
    return (
        scheme.bits == 4
        and scheme.group_size > 0
        and scheme.symmetric
        and not scheme.palette
        and scheme.activations == "int8_group"
    )


def has_positions(x: torch.fx.Node) -> bool:
    """Whether what is multiplied has as many rows as there are positions, not one."""
    shape = cast("torch.Size", traced_shape(x))
    return any(not isinstance(size, int) for size in shape)


def recoded_matmul(
    builder: GraphBuilder, weight: str, node: torch.fx.Node, known: Known
) -> ir.Value:
    """`x @ weight.T + bias` on integer kernels, from the codes that few positions use too.

    Kernels of codes in groups take about twice as long for each position, those of a scale a row
    want other codes. They are made whenever the graph runs: for row n, with the scales s of its
    groups, `step = max|s| * 8 / 64` and `new = round(code * s / step)`, so that `new` lies within
    64 around zero and its rounding moves a weight by less than 1/16 of the row's largest step.
    Inputs are rounded by position: see `integer_matmul`.

    Source: onnxruntime's operator documentation (GatherBlockQuantized, MatMulIntegerToFloat).
    """
    scheme = builder.scheme(weight)
    x = cast("torch.fx.Node", node.args[0])
    rounded, scale = round_positions(builder, x, known)
    codes, steps = _recoded(builder, weight, scheme, int(node.meta["val"].shape[-1]))
    one = builder.constant(np.array(1, np.float32))
    middle = builder.constant(np.array(MIDDLE, np.uint8))
    zero = builder.constant(np.array(0, np.int8))
    inputs = [rounded, codes, one, steps, middle, zero]
    (product,) = builder.node("MatMulIntegerToFloat", inputs, domain=CONTRIB)
    (out,) = builder.node("Mul", [product, scale])
    if len(node.args) > 2 and node.args[2] is not None:
        (out,) = builder.node("Add", [out, graph_value(builder, known, node.args[2])])
    return out


def _recoded(
    builder: GraphBuilder, weight: str, scheme: QuantScheme, rows: int
) -> tuple[ir.Value, ir.Value]:
    """Codes by row, int8 `[columns, rows]`, and the step of each row, float32 `[rows]`."""
    node = partial(builder.node, of_weights=True)
    codes, scales = builder.integer_weight(
        weight, scheme, lambda count, groups, group_bytes: (count, groups * group_bytes)
    )
    (sizes,) = node("Abs", [scales])
    last = builder.constant(np.array([-1], np.int64))
    (largest,) = node("ReduceMax", [sizes, last])
    per_step = np.float32((1 << (scheme.bits - 1)) / MOST)
    (steps,) = node("Mul", [largest, builder.constant(np.array(per_step))])
    (steps,) = node("Max", [steps, builder.constant(np.array(LEAST_SCALE, np.float32))])
    (ratios,) = node("Div", [scales, steps])
    every = builder.shared(f"rows 0 to {rows}", lambda: _every_row(builder, rows))
    how = {
        "bits": scheme.bits,
        "block_size": scheme.group_size,
        "gather_axis": 0,
        "quantize_axis": 1,
    }
    (exact,) = node("GatherBlockQuantized", [codes, every, ratios], how, domain=CONTRIB)
    columns = builder.columns(weight)
    if scheme.padded(columns) != columns:
        bounds = [builder.constant(np.array([n], np.int64)) for n in (0, columns, 1)]
        (exact,) = node("Slice", [exact, *bounds])
    one = builder.constant(np.array(1, np.float32))
    zero = builder.constant(np.array(0, np.int8))
    (recoded,) = node("QuantizeLinear", [exact, one, zero])
    (turned,) = node("Transpose", [recoded], {"perm": [1, 0]})
    (flat,) = node("Reshape", [steps, last])
    return turned, flat


def _every_row(builder: GraphBuilder, rows: int) -> ir.Value:
    """The numbers 0 to `rows`, less one.

    They depend on an input, if only by zero times its length, so that engines make no matrix in
    advance: all in float32 would take eight times the memory of the codes.
    """
    node = partial(builder.node, of_weights=True)
    (length,) = node("Shape", [builder.inputs[0]], {"start": 1, "end": 2})
    zero, one = (builder.constant(np.array(n, np.int64)) for n in (0, 1))
    (scalar,) = node("Squeeze", [length])
    (nothing,) = node("Mul", [scalar, zero])
    (end,) = node("Add", [nothing, builder.constant(np.array(rows, np.int64))])
    return node("Range", [zero, end, one])[0]
