"""Matrices multiplied as integers, their inputs rounded to 8 bits as they come."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lorgnette.errors import ConfigError
from lorgnette.quantize.scheme import QuantScheme
from lorgnette.targets.onnx.arguments import Known, graph_value, traced_shape
from lorgnette.targets.onnx.graph import CONTRIB, GraphBuilder

MIDDLE = 128
"""The code that means zero, of weights of 8 bits and of activations rounded by position."""
MOST = 127
"""Codes of activations rounded by position lie that far around the middle."""
LEAST_SCALE = 1e-30
"""Scale of positions that are zero, or so near that they are for all purposes."""


def integer_matmul(
    builder: GraphBuilder, weight: str, node: torch.fx.Node, known: Known
) -> ir.Value:
    """`x @ weight.T + bias` on integer kernels, x rounded by position or with constant numbers.

    By position: a scale for each position of x and each row of `weight`.
    `scale = max|x| / 127` over the channels of a position, `codes = round(x / scale) + 128`, and
    `y = scale * weight_scale * sum((codes - 128) * (weight_codes - zero))`, the sum in int32.

    Static: `codes = clip(round(x / scale) + zero_point, 0, 255)` with the scale and zero point
    that calibration found; otherwise the same, and no pass over x to find its largest.

    Both operands are unsigned with a zero point, but for narrow codes. Kernels that take signed
    weights add pairs of products in 16 bits on processors without dot-product instructions; narrow
    codes fit there, and are multiplied in about four fifths of the time; others would saturate, and
    take the kernels for unsigned operands, which are exact on all.

    Source: onnxruntime's operator documentation (MatMulIntegerToFloat); its MLAS, qgemm kernels.

    Raises:
        ConfigError: The scheme is none that integer kernels can carry.
    """
    scheme = builder.scheme(weight)
    _check(builder, weight, scheme)
    if scheme.activations == "int8_token":
        return by_position(builder, node, known, expanded(builder, weight, scheme))
    x = cast("torch.fx.Node", node.args[0])
    bias = _bias(builder, node, known)
    rounded, scale, middle = _round_statically(builder, weight, x, known)
    codes, weight_scale, zero = expanded(builder, weight, scheme)
    inputs = [rounded, codes, scale, weight_scale, middle, zero, *([bias] if bias else [])]
    return builder.node("MatMulIntegerToFloat", inputs, domain=CONTRIB)[0]


def by_position(
    builder: GraphBuilder,
    node: torch.fx.Node,
    known: Known,
    weight: tuple[ir.Value, ir.Value, ir.Value],
) -> ir.Value:
    """`x @ weight.T + bias`, x rounded by position: see `integer_matmul`.

    Args:
        builder: The graph.
        node: The multiplication.
        known: What is computed already.
        weight: Codes `[columns, rows]`, scales float32 `[rows]`, and the code that means zero.
    """
    bias = _bias(builder, node, known)
    rounded, scale = _round_positions(builder, cast("torch.fx.Node", node.args[0]), known)
    codes, weight_scale, zero = weight
    middle = builder.constant(np.array(MIDDLE, np.uint8))
    one = builder.constant(np.array(1, np.float32))
    inputs = [rounded, codes, one, weight_scale, middle, zero]
    (product,) = builder.node("MatMulIntegerToFloat", inputs, domain=CONTRIB)
    (out,) = builder.node("Mul", [product, scale])
    return builder.node("Add", [out, bias])[0] if bias else out


def _bias(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value | None:
    """What is added to a product, where anything is."""
    biased = len(node.args) > 2 and node.args[2] is not None
    return graph_value(builder, known, node.args[2]) if biased else None


def _check(builder: GraphBuilder, weight: str, scheme: QuantScheme) -> None:
    by_row = scheme.bits in (4, 8) and not scheme.group_size and scheme.scale_bits == 32
    by_multiple = scheme.bits == 4 and scheme.group_size > 0 and scheme.scale_bits == 8
    if scheme.palette or not scheme.symmetric or not (by_row or by_multiple):
        raise ConfigError(
            "integer kernels cannot carry the scheme of a weight",
            where=f"{builder.component.name}/{weight}",
            got=scheme.form,
            wanted="symmetric and by channel, or of 4 bits in groups with scales of 8 bits",
        )


def expanded(
    builder: GraphBuilder, weight: str, scheme: QuantScheme
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """A matrix as integer kernels read it: a byte a code, however few bits are stored.

    Codes of 4 bits by channel are widened once, as engines load. Those in groups are multiplied by
    their group's multiple, which leaves whole numbers that a byte holds and one scale for each
    row. Engines do that whenever the graph runs (they compute nothing in advance that has a
    DequantizeLinear in it), so that memory holds what is stored; for a thousand positions it takes
    a tenth of the multiplication.

    Returns:
        Codes (uint8 `[columns, rows]`), scales (float32 `[rows]`) and the code that means zero.
    """
    codes, multiples, scales = builder.column_weight(weight, scheme)
    middle = builder.constant(np.array(MIDDLE, np.uint8))
    if multiples is not None:
        return _multiplied(builder, codes, multiples, scheme, weight), scales, middle
    if scheme.narrow:
        return codes, scales, builder.constant(np.array(0, np.int8))
    if scheme.bits == 8:
        return codes, scales, middle
    to = {"to": int(ir.DataType.UINT8)}
    wide = builder.shared(
        f"bytes of {weight}", lambda: builder.node("Cast", [codes], to, of_weights=True)[0]
    )
    return wide, scales, builder.constant(np.array(1 << (scheme.bits - 1), np.uint8))


def _multiplied(
    builder: GraphBuilder,
    codes: ir.Value,
    multiples: ir.Value,
    scheme: QuantScheme,
    weight: str,
) -> ir.Value:
    """`code * multiple + 128` as bytes, through float32, which is exact for these.

    Shapes: int4 `[groups * size, rows]` and int8 `[groups, rows]` to uint8 `[columns, rows]`.
    """
    node = partial(builder.node, of_weights=True)

    def make() -> ir.Value:
        (factors,) = node("Cast", [multiples], {"to": int(ir.DataType.FLOAT)})
        blocks = {"axis": 0, "block_size": scheme.group_size}
        (whole,) = node("DequantizeLinear", [codes, factors], blocks)
        columns = builder.columns(weight)
        if scheme.padded(columns) != columns:
            bounds = [builder.constant(np.array([n], np.int64)) for n in (0, columns, 0)]
            (whole,) = node("Slice", [whole, *bounds])
        one = builder.constant(np.array(1, np.float32))
        middle = builder.constant(np.array(MIDDLE, np.uint8))
        return node("QuantizeLinear", [whole, one, middle])[0]

    return builder.shared(f"bytes of {weight}", make)


def _round_statically(
    builder: GraphBuilder, weight: str, x: torch.fx.Node, known: Known
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Codes of `x`, their scale and zero point; made once for all who ask for the same."""
    value = graph_value(builder, known, x)
    how = builder.input_range(weight)
    scale = builder.constant(np.array(how.scale, np.float32))
    zero = builder.constant(np.array(how.zero_point, np.uint8))
    codes = builder.shared(
        f"codes of {value.name} by {scale.name} {zero.name}",
        lambda: builder.node("QuantizeLinear", [value, scale, zero])[0],
    )
    return codes, scale, zero


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

    Before, by position: `codes = ...QuantizeLinear(x)...`,
    `p = MatMulIntegerToFloat(codes, w, 1, s, 128, z)`, `y = Mul(p, scale)`.
    Before, static: `codes = QuantizeLinear(x)`,
    `y = MatMulIntegerToFloat(codes, w, c, s, d, z[, bias])`.
    After: `matrix = DequantizeLinear(w, s, z)`, `y = FusedMatMul(x, matrix)[ + bias]`.

    The graph stores no matrix twice: each is made from the same codes when it runs, at most all of
    them in float32 at once.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type != "MatMulIntegerToFloat":
            continue
        float_rows, static = _source_of(node.inputs[0])
        last = node if static else next(iter(node.outputs[0].uses())).node
        made = _exact(node, float_rows)
        (product,), (out,) = last.outputs, made[-1].outputs
        out.name, out.shape, out.type = product.name, product.shape, product.type
        graph.insert_before(last, made)
        product.replace_all_uses_with(out, replace_graph_outputs=True)
        graph.remove([node] if static else [last, node], safe=True)
    RemoveUnusedNodesPass()(model)


def _exact(node: ir.Node, float_rows: ir.Value) -> list[ir.Node]:
    """The nodes of a multiplication in float32, the last of which gives the product."""
    _, weight, _, scales, _, zero, *bias = node.inputs
    made: list[ir.Node] = []

    def add(
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: Sequence[ir.Attr] = (),
        domain: str = "",
    ) -> ir.Value:
        name = f"{node.name}_exact_{operator}"
        made.append(ir.Node(domain, operator, inputs, attributes=attributes, name=name))
        made[-1].outputs[0].name = f"{name}_0"
        return made[-1].outputs[0]

    zeros = add("Expand", [zero, add("Shape", [scales])])
    axis = [ir.AttrInt64("axis", 1)]
    matrix = add("DequantizeLinear", [weight, scales, zeros], axis)
    # Not MatMul: engines turn that, behind DequantizeLinear, into one that rounds activations.
    product = add("FusedMatMul", [float_rows, matrix], domain=CONTRIB)
    if bias:
        add("Add", [product, bias[0]])
    return made


def _source_of(codes: ir.Value | None) -> tuple[ir.Value, bool]:
    """What was rounded to `codes`, in the shape of those, and whether statically."""
    made = codes.producer() if codes is not None else None
    if made is not None and made.op_type == "QuantizeLinear" and made.inputs[0] is not None:
        return made.inputs[0], True
    found = codes
    for operator in ("Reshape", "QuantizeLinear", "Reshape"):
        made = found.producer() if found is not None else None
        if made is None or made.op_type != operator:
            raise ConfigError("codes are not of rounded activations", got=codes)
        found = made.inputs[0]
    if found is None:
        raise ConfigError("codes are not of rounded activations", got=codes)
    return found, False
