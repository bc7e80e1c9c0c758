"""Translations of operators that work number by number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import onnx_ir as ir
import torch

from lorgnette.errors import ConfigError
from lorgnette.targets.onnx.arguments import Known, Translation, graph_value, traced_shape
from lorgnette.targets.onnx.graph import BROADCASTS, CONTRIB, Attribute, GraphBuilder


def unary(operator: str, attributes: Mapping[str, Attribute] | None = None) -> Translation:
    """An elementwise operator of one operand."""

    def translate(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
        return builder.node(operator, [graph_value(builder, known, node.args[0])], attributes)[0]

    return translate


def gelu(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
    """GELU, exact or by tanh."""
    approximate = cast("str", node.kwargs.get("approximate", "none"))
    x = graph_value(builder, known, node.args[0])
    return builder.node("Gelu", [x], {"approximate": approximate})[0]


def silu(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
    """`x * sigmoid(x)`."""
    x = graph_value(builder, known, node.args[0])
    return builder.node("QuickGelu", [x], {"alpha": 1.0}, domain=CONTRIB)[0]


def binary(operator: str) -> Translation:
    """An elementwise operator of two operands."""

    def translate(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> ir.Value:
        if node.kwargs:
            raise ConfigError("operator has extra arguments", where=node.name, got=node.kwargs)
        out = builder.node(operator, [graph_value(builder, known, a) for a in node.args[:2]])[0]
        if traced_shape(node.args[0]) != traced_shape(node.args[1]):
            cast("ir.Node", out.producer()).meta[BROADCASTS] = True
        return out

    return translate
