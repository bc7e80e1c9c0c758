"""One small function an operator: from a node of the traced program to ONNX nodes."""

from __future__ import annotations

from typing import cast

import numpy as np
import onnx_ir as ir
import torch

from lorgnette.errors import ConfigError
from lorgnette.targets.onnx import elementwise, rearrange
from lorgnette.targets.onnx.arguments import Known, Translation, graph_value, weight_name
from lorgnette.targets.onnx.cache import cached_attention
from lorgnette.targets.onnx.graph import CONTRIB, Attribute, GraphBuilder
from lorgnette.targets.onnx.integer_matmul import integer_matmul
from lorgnette.targets.onnx.many_positions import has_positions, is_recoded, recoded_matmul


def linear(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
    """`x @ weight.T + bias`, the weight stored as its scheme says.

    Weights keep their `[out, in]` layout: MatMulNBits wants it, FusedMatMul takes it transposed,
    and an embedding tied to the head can share the bytes.
    """
    x = graph_value(builder, known, node.args[0])
    weight = weight_name(builder, known, node.args[1])
    scheme = builder.scheme(weight)
    if scheme.activations in ("int8_token", "int8_static"):
        return integer_matmul(builder, weight, node, known)
    x_node = cast("torch.fx.Node", node.args[0])
    if builder.many_positions and is_recoded(scheme) and has_positions(x_node):
        return recoded_matmul(builder, weight, node, known)
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
        (out,) = builder.node("Add", [out, graph_value(builder, known, node.args[2])])
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
        "accuracy_level": 4 if scheme.activations == "int8_group" else 1,
    }
    inputs = [x, codes, scales, *builder.zero_points(weight, scheme)]
    (out,) = builder.node("MatMulNBits", inputs, attributes, domain=CONTRIB)
    return out


def embedding(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
    """Rows of a table; integer tables are gathered first and expanded after."""
    table = weight_name(builder, known, node.args[0])
    ids = graph_value(builder, known, node.args[1])
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
        inputs = [codes, ids, scales, *builder.zero_points(table, scheme)]
        (out,) = builder.node("GatherBlockQuantized", inputs, attributes, domain=CONTRIB)
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
    inputs = [graph_value(builder, known, value) for value in (x, weight, bias)]
    return builder.node("LayerNormalization", inputs, {"axis": -1, "epsilon": epsilon})[0]


def rms_norm(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
    """Root mean square normalisation over the last axis."""
    x, _, weight, epsilon = node.args
    inputs = [graph_value(builder, known, x), graph_value(builder, known, weight)]
    attributes = {"axis": -1, "epsilon": cast("float", epsilon), "stash_type": 1}
    # onnxruntime keeps this contrib operator in the default domain.
    return builder.node("SimplifiedLayerNormalization", inputs, attributes)[0]


def bidirectional_attention(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
    """Attention without mask as one fused operator."""
    inputs = [graph_value(builder, known, argument) for argument in node.args[:3]]
    attributes = {"num_heads": cast("int", node.args[3])}
    return builder.node("MultiHeadAttention", inputs, attributes, domain=CONTRIB)[0]


def convolution(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
    """A two-dimensional convolution, its kernel float32 under every plan."""
    x, kernel, bias, stride, padding, dilation, groups = (
        node.args[i] if len(node.args) > i else default
        for i, default in enumerate((None, None, None, [1, 1], [0, 0], [1, 1], 1))
    )
    weight = weight_name(builder, known, kernel)
    builder.keep_in_float(weight, "a convolution's kernel: schemes are for matrices")
    inputs = [graph_value(builder, known, x), builder.float_weight(weight)]
    if bias is not None:
        inputs.append(graph_value(builder, known, bias))
    attributes: dict[str, Attribute] = {
        "strides": cast("list[int]", stride),
        "pads": 2 * cast("list[int]", padding),
        "dilations": cast("list[int]", dilation),
        "group": cast("int", groups),
    }
    return builder.node("Conv", inputs, attributes)[0]


def average_pool(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
    """Means of patches side by side, without border.

    Raises:
        ConfigError: Patches overlap or stand apart, or there is a border.
    """
    kernel = cast("list[int]", node.args[1])
    if (len(node.args) > 2 and node.args[2] != kernel) or len(node.args) > 3 or node.kwargs:
        raise ConfigError("pooling is not of patches side by side", where=node.name, got=node.args)
    x = graph_value(builder, known, node.args[0])
    return builder.node("AveragePool", [x], {"kernel_shape": kernel, "strides": kernel})[0]


def mean(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
    """The mean over some axes."""
    if node.kwargs:
        raise ConfigError("operator has extra arguments", where=node.name, got=node.kwargs)
    axes = builder.constant(np.array(node.args[1], np.int64))
    keep = len(node.args) > 2 and bool(node.args[2])
    x = graph_value(builder, known, node.args[0])
    return builder.node("ReduceMean", [x, axes], {"keepdims": int(keep)})[0]


TRANSLATIONS: dict[str, Translation] = {
    "aten.linear.default": linear,
    "aten.embedding.default": embedding,
    "aten.layer_norm.default": layer_norm,
    "aten.rms_norm.default": rms_norm,
    "lorgnette.bidirectional_attention.default": bidirectional_attention,
    "lorgnette.cached_attention.default": cached_attention,
    "aten.conv2d.default": convolution,
    "aten.avg_pool2d.default": average_pool,
    "aten.mean.dim": mean,
    "aten.gelu.default": elementwise.gelu,
    "aten.silu.default": elementwise.silu,
    "aten.relu.default": elementwise.unary("Relu"),
    "aten.sigmoid.default": elementwise.unary("Sigmoid"),
    # torch's slope; the standard's own is another.
    "aten.hardsigmoid.default": elementwise.unary("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
    "aten.hardswish.default": elementwise.unary("HardSwish"),
    "aten.add.Tensor": elementwise.binary("Add"),
    "aten.sub.Tensor": elementwise.binary("Sub"),
    "aten.mul.Tensor": elementwise.binary("Mul"),
    "aten.div.Tensor": elementwise.binary("Div"),
    "aten.reshape.default": rearrange.reshape,
    "aten.view.default": rearrange.reshape,
    "aten.permute.default": rearrange.permute,
    "aten.unsqueeze.default": rearrange.unsqueeze,
    "aten.pad.default": rearrange.pad,
    "aten.select.int": rearrange.select,
    "aten.slice.Tensor": rearrange.slice_axis,
    "aten.chunk.default": rearrange.chunk,
    "aten.to.dtype": rearrange.cast_to,
    "aten.alias.default": rearrange.same,
    "aten._assert_tensor_metadata.default": rearrange.nothing,
    "aten.sym_size.int": rearrange.dynamic_size,
    "<built-in function mul>": rearrange.dynamic_size,
    "<built-in function getitem>": rearrange.get_item,
}
