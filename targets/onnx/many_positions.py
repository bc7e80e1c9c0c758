"""Multiplications of hundreds of positions: codes of 4 bits recoded for integer kernels."""

from __future__ import annotations

from functools import partial
from typing import cast

import numpy as np
import onnx_ir as ir
import torch

from lorgnette.quantize.scheme import NARROW, QuantScheme
from lorgnette.targets.onnx.arguments import Known, traced_shape
from lorgnette.targets.onnx.graph import CONTRIB, GraphBuilder
from lorgnette.targets.onnx.integer_matmul import LEAST_SCALE, by_position


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

    Kernels of codes in groups take longer for each position (`python -m benchmarks.operators`),
    those of a scale a row want other codes. They are made whenever the graph runs: for each row,
    with the scales s of its groups, `step = max|s| * 8 / 64` and `new = round(code * s / step)`, so
    that `new` is narrow, within 64 around zero, and its rounding moves a weight by at most 1/16 of
    the row's largest scale.
    Inputs are rounded by position: see `integer_matmul`.

    Source: onnxruntime's operator documentation (GatherBlockQuantized, MatMulIntegerToFloat).
    """
    rows = int(node.meta["val"].shape[-1])
    return by_position(builder, node, known, _recoded(builder, weight, rows))


def _recoded(builder: GraphBuilder, weight: str, rows: int) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Codes by row, int8 `[columns, rows]`, the step of each, float32 `[rows]`, and zero's code."""
    scheme = builder.scheme(weight)
    node = partial(builder.node, of_weights=True)
    codes, scales = builder.integer_weight(
        weight, scheme, lambda count, groups, group_bytes: (count, groups * group_bytes)
    )
    (sizes,) = node("Abs", [scales])
    last = builder.constant(np.array([-1], np.int64))
    (largest,) = node("ReduceMax", [sizes, last])
    per_step = np.float32(scheme.middle / NARROW)
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
    return turned, flat, zero


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
