"""Translations of operators that move numbers about and compute none."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch

from lorgnette.errors import ConfigError
from lorgnette.targets.coreml.builder import (
    FunctionBuilder,
    Known,
    graph_value,
    traced_shape,
)
from lorgnette.targets.coreml.mil import Builder, Var


def reshape(builder: FunctionBuilder, node: torch.fx.Node, known: Known) -> Var:
    """Another shape; the traced result's, as every size is known."""
    x = graph_value(builder, known, node.args[0])
    shape = traced_shape(node)
    return x if tuple(x.shape) == shape else Builder.reshape(x=x, shape=list(shape))


def permute(builder: FunctionBuilder, node: torch.fx.Node, known: Known) -> Var:
    """A permutation of axes."""
    x = graph_value(builder, known, node.args[0])
    return Builder.transpose(x=x, perm=cast("list[int]", node.args[1]))


def pad(builder: FunctionBuilder, node: torch.fx.Node, known: Known) -> Var:
    """Zeros around.

    Raises:
        ConfigError: It is filled with something else.
    """
    sizes = cast("list[int]", node.args[1])
    if len(node.args) > 2 or node.kwargs or not all(isinstance(size, int) for size in sizes):
        raise ConfigError("padding is not constant", where=f"{builder.component.name} {node}")
    return pad_zeros(builder, graph_value(builder, known, node.args[0]), sizes)


def pad_zeros(builder: FunctionBuilder, x: Var, sizes: list[int]) -> Var:
    """Zeros around; sizes are pairs from the last axis on, as torch counts them."""
    pairs = np.zeros((x.rank, 2), np.int32)
    pairs[x.rank - len(sizes) // 2 :] = np.reshape(sizes, (-1, 2))[::-1]
    return Builder.pad(
        x=x, pad=pairs.reshape(-1), mode="constant", constant_val=builder.number(0.0)
    )


def select(builder: FunctionBuilder, node: torch.fx.Node, known: Known) -> Var:
    """One index of an axis, which is dropped.

    The last position of a decoder's is the row that the input `last_row` names, where the function
    has one: the positions behind it only fill the call up.
    """
    x = graph_value(builder, known, node.args[0])
    axis, index = cast("int", node.args[1]), cast("int", node.args[2])
    last_row = builder.inputs.get("last_row")
    if last_row is not None and axis == 1 and index == -1:
        before, after = np.zeros(axis, np.int32), np.zeros(x.rank - axis - 1, np.int32)
        begin = Builder.concat(values=[before, last_row, after], axis=0)
        size = [1 if at == axis else extent for at, extent in enumerate(x.shape)]
        row = Builder.slice_by_size(x=x, begin=begin, size=np.array(size, np.int32))
        return Builder.squeeze(x=row, axes=[axis])
    begin = [index % x.shape[at] if at == axis else 0 for at in range(x.rank)]
    end = [begin[at] + 1 if at == axis else x.shape[at] for at in range(x.rank)]
    mask = [at == axis for at in range(x.rank)]
    return Builder.slice_by_index(x=x, begin=begin, end=end, squeeze_mask=mask)


def slice_axis(builder: FunctionBuilder, node: torch.fx.Node, known: Known) -> Var:
    """A contiguous part of an axis."""
    axis, start, end = (
        node.args[i] if len(node.args) > i else default
        for i, default in ((1, 0), (2, 0), (3, None))
    )
    if len(node.args) > 4 or not all(isinstance(b, int | None) for b in (axis, start, end)):
        raise ConfigError("slice is not constant", where=f"{builder.component.name} {node}")
    x = graph_value(builder, known, node.args[0])
    at = cast("int", axis) % x.rank
    first, last, _ = slice(start, end).indices(x.shape[at])
    if (first, last) == (0, x.shape[at]):
        return x
    begins, ends = [0] * x.rank, list(x.shape)
    begins[at], ends[at] = first, last
    return Builder.slice_by_index(x=x, begin=begins, end=ends)


def chunk(builder: FunctionBuilder, node: torch.fx.Node, known: Known) -> list[Var]:
    """An axis cut into equal parts.

    Raises:
        ConfigError: The axis is not divisible.
    """
    count = cast("int", node.args[1])
    axis = cast("int", node.args[2]) if len(node.args) > 2 else 0
    if traced_shape(node.args[0])[axis] % count:
        raise ConfigError("chunks are not equal", where=f"{builder.component.name} {node}")
    x = graph_value(builder, known, node.args[0])
    return list(Builder.split(x=x, num_splits=count, axis=axis))


def unsqueeze(builder: FunctionBuilder, node: torch.fx.Node, known: Known) -> Var:
    """A new axis of size one."""
    x = graph_value(builder, known, node.args[0])
    return Builder.expand_dims(x=x, axes=[cast("int", node.args[1])])


def cast_to(builder: FunctionBuilder, node: torch.fx.Node, known: Known) -> Var:
    """A change of dtype: to float32 means to what the function computes in.

    Raises:
        ConfigError: It is to something else.
    """
    if node.args[1] != torch.float32:
        raise ConfigError("cast is not to float32", where=node.name, got=node.args[1])
    x = graph_value(builder, known, node.args[0])
    return to_arithmetic(builder, x)


def to_arithmetic(builder: FunctionBuilder, x: Var) -> Var:
    """A value in the type that the function computes in."""
    from lorgnette.targets.coreml.mil import types

    if x.dtype == types.string_to_builtin(builder.mil_dtype):
        return x
    return Builder.cast(x=x, dtype=builder.mil_dtype)


def same(_: FunctionBuilder, node: torch.fx.Node, known: Known) -> object:
    """The first argument unchanged."""
    return known[cast("torch.fx.Node", node.args[0])]


def get_item(_: FunctionBuilder, node: torch.fx.Node, known: Known) -> object:
    """One output of an operator with several."""
    outputs = known[cast("torch.fx.Node", node.args[0])]
    return cast("list[Any]", outputs)[cast("int", node.args[1])]


def nothing(_: FunctionBuilder, __: torch.fx.Node, ___: Known) -> None:
    """A check of the tracer, without effect in a graph."""
