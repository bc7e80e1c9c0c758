"""Multiplications of hundreds of positions: codes of 4 bits recoded for integer kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """`x @ weight.T + bias` on integer kernels, with what `weights_graph` makes of the weight.

    Kernels of codes in groups take longer for each position than those of a scale a row, which want
    other codes. Inputs are rounded by position: see `integer_matmul`.

    Source: onnxruntime's operator documentation (MatMulIntegerToFloat).
    """
    if weight not in builder.made_weights:
        builder.made_weights[weight] = _values(
            weight, builder.columns(weight), builder.rows(weight)
        )
    codes, steps = builder.made_weights[weight]
    zero = builder.constant(np.array(0, np.int8))
    return by_position(builder, node, known, (codes, steps, zero))


def weights_graph(builder: GraphBuilder, wanted: Mapping[str, Sequence[ir.Value]]) -> ir.Model:
    """A graph that makes codes by row of codes in groups: the further inputs of a prefill graph.

    For each row, with the scales s of its groups, `step = max|s| * 8 / 64` and
    `new = round(code * s / step)`, so that `new` is narrow, within 64 around zero, and its rounding
    moves a weight by at most 1/16 of the row's largest scale.

    Its one input `first_row`, int64 `[]`, is 0: engines compute in advance what depends on no
    input, and all matrices in float32 would take eight times the memory of the codes.

    Source: onnxruntime's operator documentation (GatherBlockQuantized).

    Args:
        builder: An empty graph of the same component.
        wanted: By matrix, int8 `[columns, rows]` and float32 `[rows]`.
    """
    first_row = ir.Value(
        name="first_row", shape=ir.Shape(()), type=ir.TensorType(ir.DataType.INT64)
    )
    outputs = []
    for weight, values in wanted.items():
        builder.module = weight.removesuffix(".weight")
        for made, value in zip(_recoded(builder, weight, first_row), values, strict=True):
            made.name, made.type, made.shape = value.name, value.type, value.shape
            outputs.append(made)
    return builder.close([first_row], outputs)


def _values(weight: str, columns: int, rows: int) -> tuple[ir.Value, ir.Value]:
    """Codes and steps of a matrix, as the prefill graph is given them."""
    return (
        ir.Value(
            name=f"{weight}.codes",
            shape=ir.Shape((columns, rows)),
            type=ir.TensorType(ir.DataType.INT8),
        ),
        ir.Value(
            name=f"{weight}.steps",
            shape=ir.Shape((rows,)),
            type=ir.TensorType(ir.DataType.FLOAT),
        ),
    )


def _recoded(builder: GraphBuilder, weight: str, first_row: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Codes by row, int8 `[columns, rows]`, and the step of each, float32 `[rows]`."""
    scheme = builder.scheme(weight)
    codes, scales = builder.integer_weight(
        weight, scheme, lambda count, groups, group_bytes: (count, groups * group_bytes)
    )
    (sizes,) = builder.node("Abs", [scales])
    last = builder.constant(np.array([-1], np.int64))
    (largest,) = builder.node("ReduceMax", [sizes, last])
    per_step = np.float32(scheme.middle / NARROW)
    (steps,) = builder.node("Mul", [largest, builder.constant(np.array(per_step))])
    least = builder.constant(np.array(LEAST_SCALE, np.float32))
    (steps,) = builder.node("Max", [steps, least])
    (ratios,) = builder.node("Div", [scales, steps])
    rows = builder.rows(weight)
    every = builder.shared(f"rows to {rows}", lambda: _every_row(builder, first_row, rows))
    how = {
        "bits": scheme.bits,
        "block_size": scheme.group_size,
        "gather_axis": 0,
        "quantize_axis": 1,
    }
    (exact,) = builder.node("GatherBlockQuantized", [codes, every, ratios], how, domain=CONTRIB)
    columns = builder.columns(weight)
    if scheme.padded(columns) != columns:
        bounds = [builder.constant(np.array([n], np.int64)) for n in (0, columns, 1)]
        (exact,) = builder.node("Slice", [exact, *bounds])
    one = builder.constant(np.array(1, np.float32))
    zero = builder.constant(np.array(0, np.int8))
    (recoded,) = builder.node("QuantizeLinear", [exact, one, zero])
    (turned,) = builder.node("Transpose", [recoded], {"perm": [1, 0]})
    (flat,) = builder.node("Reshape", [steps, last])
    return turned, flat


def _every_row(builder: GraphBuilder, first_row: ir.Value, rows: int) -> ir.Value:
    end, step = (builder.constant(np.array(n, np.int64)) for n in (rows, 1))
    return builder.node("Range", [first_row, end, step])[0]
