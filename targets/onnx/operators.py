"""One small function an operator: from a node of the traced program to ONNX nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch

from lorgnette.errors import ConfigError
from lorgnette.targets.onnx.graph import BROADCASTS, CONTRIB, DTYPES, GraphBuilder


@dataclass(frozen=True)
class Parameter:
    """A weight that no graph value stands for yet: the operator decides how it is stored."""

    name: str


class DynamicSize:
    """A size known only at run time."""


Known = Mapping[torch.fx.Node, object]
Translation = Callable[[GraphBuilder, torch.fx.Node, Known], object]


def _value(builder: GraphBuilder, known: Known, argument: object) -> ir.Value:
    """The graph value of an argument: computed, a float weight, or a number."""
    if isinstance(argument, torch.fx.Node):
        argument = known[argument]
    if isinstance(argument, ir.Value):
        return argument
    if isinstance(argument, Parameter):
        return builder.float_weight(argument.name)
    if isinstance(argument, int | float):
        return builder.constant(np.array(argument, np.float32))
    raise ConfigError("argument has no graph value", where=builder.component.name, got=argument)


def _parameter(builder: GraphBuilder, known: Known, argument: object) -> str:
    found = known[argument] if isinstance(argument, torch.fx.Node) else argument
    if not isinstance(found, Parameter):
        raise ConfigError("operand is not a weight", where=builder.component.name, got=argument)
    return found.name


def linear(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
    """`x @ weight.T + bias`, the weight stored as its scheme says.

    Weights keep their `[out, in]` layout: MatMulNBits wants it, FusedMatMul takes it transposed,
    and an embedding tied to the head can share the bytes.
    """
    x = _value(builder, known, node.args[0])
    weight = _parameter(builder, known, node.args[1])
    scheme = builder.scheme(weight)
    if scheme.is_integer:
        out = _grouped_matmul(builder, x, weight, node)
    else:
        if scheme.bits == 16:
            half = builder.float_weight(weight, np.float16)
            (matrix,) = builder.node("Cast", [half], {"to": int(ir.DataType.FLOAT)})
        else:
            matrix = builder.float_weight(weight)
        (out,) = builder.node("FusedMatMul", [x, matrix], {"transB": 1}, domain=CONTRIB)
    if len(node.args) > 2 and node.args[2] is not None:
        (out,) = builder.node("Add", [out, _value(builder, known, node.args[2])])
    return out


def _grouped_matmul(
    builder: GraphBuilder, x: ir.Value, weight: str, node: torch.fx.Node
) -> ir.Value:
    scheme = builder.scheme(weight)
    columns = cast("torch.fx.Node", node.args[0]).meta["val"].shape[-1]
    rows = node.meta["val"].shape[-1]
    codes, scales = builder.integer_weight(weight, scheme, lambda *sizes: sizes)
    attributes = {
        "K": int(columns),
        "N": int(rows),
        "bits": scheme.bits,
        "block_size": scheme.group_size,
        # 4: multiply in int8; 1: in float32. Source: onnxruntime's operator documentation.
        "accuracy_level": 4 if scheme.int8_activations else 1,
    }
    (out,) = builder.node("MatMulNBits", [x, codes, scales], attributes, domain=CONTRIB)
    return out


def embedding(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
    """Rows of a table; integer tables are gathered first and expanded after."""
    table = _parameter(builder, known, node.args[0])
    ids = _value(builder, known, node.args[1])
    scheme = builder.scheme(table)
    if scheme.is_integer:
        codes, scales = builder.integer_weight(
            table, scheme, lambda rows, groups, group_bytes: (rows, groups * group_bytes)
        )
        attributes = {
            "bits": scheme.bits,
            "block_size": scheme.group_size,
            "gather_axis": 0,
            "quantize_axis": 1,
        }
        (out,) = builder.node(
            "GatherBlockQuantized", [codes, ids, scales], attributes, domain=CONTRIB
        )
        return out
    half = scheme.bits == 16
    (out,) = builder.node(
        "Gather", [builder.float_weight(table, np.float16 if half else np.float32), ids]
    )
    if half:
        (out,) = builder.node("Cast", [out], {"to": int(ir.DataType.FLOAT)})
    return out


def layer_norm(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
    """Layer normalisation over the last axis."""
    x, _, weight, bias = (node.args[i] for i in range(4))
    epsilon = cast("float", node.args[4]) if len(node.args) > 4 else 1e-5
    inputs = [_value(builder, known, value) for value in (x, weight, bias)]
    return builder.node("LayerNormalization", inputs, {"axis": -1, "epsilon": epsilon})[0]


def rms_norm(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
    """Root mean square normalisation over the last axis."""
    x, _, weight, epsilon = node.args
    inputs = [_value(builder, known, x), _value(builder, known, weight)]
    attributes = {"axis": -1, "epsilon": cast("float", epsilon), "stash_type": 1}
    # onnxruntime keeps this contrib operator in the default domain.
    return builder.node("SimplifiedLayerNormalization", inputs, attributes)[0]


def bidirectional_attention(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
    """Attention without mask as one fused operator."""
    inputs = [_value(builder, known, argument) for argument in node.args[:3]]
    attributes = {"num_heads": cast("int", node.args[3])}
    return builder.node("MultiHeadAttention", inputs, attributes, domain=CONTRIB)[0]


def cached_attention(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> list[ir.Value]:
    """Grouped-query attention with rotary embedding, writing the bound cache in place."""
    qkv, key_cache, value_cache, cos, sin, past = (
        _value(builder, known, argument) for argument in node.args[:6]
    )
    total = builder.shared("total_length", lambda: _total_length(builder, past))
    last = builder.shared(
        "last_position",
        lambda: builder.node("Sub", [total, builder.constant(np.array([1], np.int32))])[0],
    )
    attributes = {
        "num_heads": cast("int", node.args[6]),
        "kv_num_heads": cast("int", node.args[7]),
        "do_rotary": 1,
    }
    inputs = [qkv, None, None, key_cache, value_cache, last, total, cos, sin]
    return builder.node("GroupQueryAttention", inputs, attributes, domain=CONTRIB, outputs=3)


def _total_length(builder: GraphBuilder, past: ir.Value) -> ir.Value:
    (length,) = builder.node("Shape", [builder.inputs[0]], {"start": 1, "end": 2})
    (length,) = builder.node("Cast", [length], {"to": int(ir.DataType.INT32)})
    return builder.node("Add", [past, length])[0]


def gelu(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
    """GELU, exact or by tanh."""
    approximate = cast("str", node.kwargs.get("approximate", "none"))
    x = _value(builder, known, node.args[0])
    return builder.node("Gelu", [x], {"approximate": approximate})[0]


def silu(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
    """`x * sigmoid(x)`."""
    x = _value(builder, known, node.args[0])
    return builder.node("QuickGelu", [x], {"alpha": 1.0}, domain=CONTRIB)[0]


def binary(operator: str) -> Translation:
    """An elementwise operator of two operands."""

    def translate(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
        if node.kwargs:
            raise ConfigError("operator has extra arguments", where=node.name, got=node.kwargs)
        out = builder.node(operator, [_value(builder, known, a) for a in node.args[:2]])[0]
        if _shape(node.args[0]) != _shape(node.args[1]):
            cast("ir.Node", out.producer()).meta[BROADCASTS] = True
        return out

    return translate


def _shape(argument: object) -> torch.Size | None:
    return argument.meta["val"].shape if isinstance(argument, torch.fx.Node) else None


def reshape(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
    """A reshape with at most one size that is known only at run time."""
    sizes = [
        -1 if isinstance(size, torch.fx.Node) else size
        for size in cast("list[int | torch.fx.Node]", node.args[1])
    ]
    if sizes.count(-1) > 1:
        raise ConfigError("reshape has two dynamic sizes", where=f"{builder.component.name} {node}")
    shape = builder.constant(np.array(sizes, np.int64))
    return builder.node("Reshape", [_value(builder, known, node.args[0]), shape])[0]


def permute(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
    """A permutation of axes."""
    x = _value(builder, known, node.args[0])
    return builder.node("Transpose", [x], {"perm": cast("list[int]", node.args[1])})[0]


def select(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
    """One index of an axis, which is dropped."""
    x = _value(builder, known, node.args[0])
    index = builder.constant(np.array(node.args[2], np.int64))
    return builder.node("Gather", [x, index], {"axis": cast("int", node.args[1])})[0]


def slice_axis(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
    """A contiguous part of an axis."""
    axis, start, end = (
        node.args[i] if len(node.args) > i else default
        for i, default in ((1, 0), (2, 0), (3, None))
    )
    bounds = [start or 0, np.iinfo(np.int64).max if end is None else end, axis]
    if len(node.args) > 4 or not all(isinstance(bound, int | np.integer) for bound in bounds):
        raise ConfigError("slice is not constant", where=f"{builder.component.name} {node}")
    inputs = [builder.constant(np.array([bound], np.int64)) for bound in bounds]
    return builder.node("Slice", [_value(builder, known, node.args[0]), *inputs])[0]


def chunk(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> list[ir.Value]:
    """An axis cut into equal parts.

    Raises:
        ConfigError: The axis is not divisible.
    """
    count = cast("int", node.args[1])
    axis = cast("int", node.args[2]) if len(node.args) > 2 else 0
    size = cast("torch.fx.Node", node.args[0]).meta["val"].shape[axis]
    if size % count:
        raise ConfigError("chunks are not equal", where=f"{builder.component.name} {node}")
    x = _value(builder, known, node.args[0])
    return builder.node("Split", [x], {"axis": axis, "num_outputs": count}, outputs=count)


def cast_to(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
    """A change of dtype."""
    x = _value(builder, known, node.args[0])
    dtype = DTYPES[cast("torch.dtype", node.args[1])]
    return builder.node("Cast", [x], {"to": int(dtype)})[0]


def same(_: GraphBuilder, node: torch.fx.Node, known: Known) -> object:
    """The first argument unchanged."""
    return known[cast("torch.fx.Node", node.args[0])]


def get_item(_: GraphBuilder, node: torch.fx.Node, known: Known) -> object:
    """One output of an operator with several."""
    outputs = known[cast("torch.fx.Node", node.args[0])]
    return cast("list[Any]", outputs)[cast("int", node.args[1])]


def dynamic_size(_: GraphBuilder, __: torch.fx.Node, ___: Known) -> DynamicSize:
    """A size, or arithmetic on sizes; `reshape` leaves it to the engine."""
    return DynamicSize()


def nothing(_: GraphBuilder, __: torch.fx.Node, ___: Known) -> None:
    """A check of the tracer, without effect in a graph."""


TRANSLATIONS: dict[str, Translation] = {
    "aten.linear.default": linear,
    "aten.embedding.default": embedding,
    "aten.layer_norm.default": layer_norm,
    "aten.rms_norm.default": rms_norm,
    "lorgnette.bidirectional_attention.default": bidirectional_attention,
    "lorgnette.cached_attention.default": cached_attention,
    "aten.gelu.default": gelu,
    "aten.silu.default": silu,
    "aten.add.Tensor": binary("Add"),
    "aten.sub.Tensor": binary("Sub"),
    "aten.mul.Tensor": binary("Mul"),
    "aten.div.Tensor": binary("Div"),
    "aten.reshape.default": reshape,
    "aten.view.default": reshape,
    "aten.permute.default": permute,
    "aten.select.int": select,
    "aten.slice.Tensor": slice_axis,
    "aten.chunk.default": chunk,
    "aten.to.dtype": cast_to,
    "aten.alias.default": same,
    "aten._assert_tensor_metadata.default": nothing,
    "aten.sym_size.int": dynamic_size,
    "<built-in function mul>": dynamic_size,
    "<built-in function getitem>": get_item,
}
