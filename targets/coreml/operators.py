"""One small function an operator: from a node of the traced program to operators of MIL."""

from __future__ import annotations

from typing import cast

import torch

from lorgnette.errors import ConfigError
from lorgnette.targets.coreml import elementwise, rearrange
from lorgnette.targets.coreml.attention import ATTENTION
from lorgnette.targets.coreml.builder import (
    FunctionBuilder,
    Known,
    Translation,
    graph_value,
    weight_name,
)
from lorgnette.targets.coreml.matrices import embedding, linear
from lorgnette.targets.coreml.mil import Builder, Var
from lorgnette.targets.coreml.norms import layer_norm, rms_norm


def convolution(builder: FunctionBuilder, node: torch.fx.Node, known: Known) -> Var:
    """A two-dimensional convolution, its kernel float under every plan."""
    x, kernel, bias, stride, padding, dilation, groups = (
        node.args[i] if len(node.args) > i else default
        for i, default in enumerate((None, None, None, [1, 1], [0, 0], [1, 1], 1))
    )
    weight = weight_name(builder, known, kernel)
    builder.keep_in_float(weight, "a convolution's kernel: schemes are for matrices")
    rows, columns = cast("list[int]", padding)
    return Builder.conv(
        x=graph_value(builder, known, x),
        weight=builder.float_weight(weight),
        bias=None if bias is None else graph_value(builder, known, bias),
        strides=cast("list[int]", stride),
        pad_type="custom",
        pad=[rows, rows, columns, columns],
        dilations=cast("list[int]", dilation),
        groups=cast("int", groups),
    )


def average_pool(builder: FunctionBuilder, node: torch.fx.Node, known: Known) -> Var:
    """Means of patches side by side, without border.

    Raises:
        ConfigError: Patches overlap or stand apart, or there is a border.
    """
    kernel = cast("list[int]", node.args[1])
    if (len(node.args) > 2 and node.args[2] != kernel) or len(node.args) > 3 or node.kwargs:
        raise ConfigError("pooling is not of patches side by side", where=node.name, got=node.args)
    x = graph_value(builder, known, node.args[0])
    return Builder.avg_pool(x=x, kernel_sizes=kernel, strides=kernel, pad_type="valid")


def mean(builder: FunctionBuilder, node: torch.fx.Node, known: Known) -> Var:
    """The mean over some axes."""
    if node.kwargs:
        raise ConfigError("operator has extra arguments", where=node.name, got=node.kwargs)
    x = graph_value(builder, known, node.args[0])
    keep = len(node.args) > 2 and bool(node.args[2])
    return Builder.reduce_mean(x=x, axes=cast("list[int]", node.args[1]), keep_dims=keep)


TRANSLATIONS: dict[str, Translation] = {
    **ATTENTION,
    "aten.linear.default": linear,
    "aten.embedding.default": embedding,
    "aten.layer_norm.default": layer_norm,
    "aten.rms_norm.default": rms_norm,
    "aten.conv2d.default": convolution,
    "aten.avg_pool2d.default": average_pool,
    "aten.mean.dim": mean,
    "aten.gelu.default": elementwise.gelu,
    "aten.silu.default": elementwise.unary(Builder.silu),
    "aten.relu.default": elementwise.unary(Builder.relu),
    "aten.sigmoid.default": elementwise.unary(Builder.sigmoid),
    "aten.hardsigmoid.default": elementwise.hardsigmoid,
    "aten.hardswish.default": elementwise.hardswish,
    "aten.add.Tensor": elementwise.binary(Builder.add),
    "aten.sub.Tensor": elementwise.binary(Builder.sub),
    "aten.mul.Tensor": elementwise.multiply,
    "aten.div.Tensor": elementwise.binary(Builder.real_div),
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
    "<built-in function getitem>": rearrange.get_item,
}
