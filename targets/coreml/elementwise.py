"""Translations of operators that work number by number."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch

from lorgnette.errors import ConfigError
from lorgnette.targets.coreml.builder import FunctionBuilder, Known, Translation, graph_value
from lorgnette.targets.coreml.mil import Builder, Var


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
