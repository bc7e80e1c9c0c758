"""Translations of operators that work number by number."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch

from lorgnette.errors import ConfigError
from lorgnette.targets.coreml.builder import FunctionBuilder, Known, Translation, graph_value
from lorgnette.targets.coreml.mil import Builder, Var

QUICK_GELU = 1.702
"""The slope of MIL's gelu by sigmoid."""


def unary(operator: Callable[..., Var]) -> Translation:
    """An operator of one operand."""

    def translate(builder: FunctionBuilder, node: torch.fx.Node, known: Known) -> Var:
        return operator(x=graph_value(builder, known, node.args[0]))

    return translate


def binary(operator: Callable[..., Var]) -> Translation:
    """An operator of two operands."""

    def translate(builder: FunctionBuilder, node: torch.fx.Node, known: Known) -> Var:
        if node.kwargs:
            raise ConfigError("operator has extra arguments", where=node.name, got=node.kwargs)
        x, y = (graph_value(builder, known, argument) for argument in node.args[:2])
        return operator(x=x, y=y)

    return translate


def gelu(builder: FunctionBuilder, node: torch.fx.Node, known: Known) -> Var:
    """GELU, exact or by tanh."""
    approximate = cast("str", node.kwargs.get("approximate", "none"))
    mode = {"none": "EXACT", "tanh": "TANH_APPROXIMATION"}[approximate]
    return Builder.gelu(x=graph_value(builder, known, node.args[0]), mode=mode)


def multiply(builder: FunctionBuilder, node: torch.fx.Node, known: Known) -> Var:
    """A product; `x * sigmoid(1.702 * x)` becomes the one operator that it is.

    What is joined stays behind without a use and is removed when the function is finished.
    """
    x = _quick_gelu_of(node)
    if x is None:
        return binary(Builder.mul)(builder, node, known)
    return Builder.gelu(x=graph_value(builder, known, x), mode="SIGMOID_APPROXIMATION")


def _quick_gelu_of(node: torch.fx.Node) -> torch.fx.Node | None:
    """What a product is the quick GELU of; None where it is something else."""
    x, gate = node.args[:2]
    if not isinstance(x, torch.fx.Node) or not isinstance(gate, torch.fx.Node):
        return None
    if str(gate.target) != "aten.sigmoid.default":
        return None
    scaled = gate.args[0]
    if not isinstance(scaled, torch.fx.Node) or str(scaled.target) != "aten.mul.Tensor":
        return None
    return x if scaled.args == (x, QUICK_GELU) else None


def hardsigmoid(builder: FunctionBuilder, node: torch.fx.Node, known: Known) -> Var:
    """`clip(x / 6 + 1 / 2, 0, 1)`, the slope that torch has."""
    x = graph_value(builder, known, node.args[0])
    return _hardsigmoid(builder, x)


def hardswish(builder: FunctionBuilder, node: torch.fx.Node, known: Known) -> Var:
    """`x * hardsigmoid(x)`."""
    x = graph_value(builder, known, node.args[0])
    return Builder.mul(x=x, y=_hardsigmoid(builder, x))


def _hardsigmoid(builder: FunctionBuilder, x: Var) -> Var:
    return Builder.sigmoid_hard(x=x, alpha=builder.number(1 / 6), beta=builder.number(0.5))
