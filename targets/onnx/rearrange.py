"""Translations of operators that move numbers about and compute none."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch

from lorgnette.errors import ConfigError
from lorgnette.targets.onnx.arguments import DynamicSize, Known, graph_value, traced_shape
from lorgnette.targets.onnx.graph import DTYPES, GraphBuilder


def reshape(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
    """A reshape with at most one size that is known only at run time."""
    sizes = [
        -1 if isinstance(size, torch.fx.Node) else size
        for size in cast("list[int | torch.fx.Node]", node.args[1])
    ]
    if sizes.count(-1) > 1:
        raise ConfigError("reshape has two dynamic sizes", where=f"{builder.component.name} {node}")
    shape = builder.constant(np.array(sizes, np.int64))
    return builder.node("Reshape", [graph_value(builder, known, node.args[0]), shape])[0]


def permute(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
    """A permutation of axes."""
    x = graph_value(builder, known, node.args[0])
    return builder.node("Transpose", [x], {"perm": cast("list[int]", node.args[1])})[0]


def unsqueeze(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
    """A new axis of size one."""
    axis = builder.constant(np.array([node.args[1]], np.int64))
    return builder.node("Unsqueeze", [graph_value(builder, known, node.args[0]), axis])[0]


def pad(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
    """Zeros around, the sizes known in advance.

    Raises:
        ConfigError: It is filled with something else, or by a size known only at run time.
    """
    sizes = cast("list[int]", node.args[1])
    constant = all(isinstance(size, int) for size in sizes)
    if len(node.args) > 2 or node.kwargs or not constant:
        raise ConfigError("padding is not constant", where=f"{builder.component.name} {node}")
    rank = len(cast("torch.Size", traced_shape(node.args[0])))
    # torch counts pairs from the last axis; ONNX wants all beginnings, then all ends.
    bounds = np.zeros((2, rank), np.int64)
    bounds[:, rank - len(sizes) // 2 :] = np.reshape(sizes, (-1, 2))[::-1].T
    x = graph_value(builder, known, node.args[0])
    return builder.node("Pad", [x, builder.constant(bounds.flatten())])[0]


def select(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
    """One index of an axis, which is dropped."""
    x = graph_value(builder, known, node.args[0])
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
    return builder.node("Slice", [graph_value(builder, known, node.args[0]), *inputs])[0]


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
    x = graph_value(builder, known, node.args[0])
    return builder.node("Split", [x], {"axis": axis, "num_outputs": count}, outputs=count)


def cast_to(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
    """A change of dtype."""
    x = graph_value(builder, known, node.args[0])
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
