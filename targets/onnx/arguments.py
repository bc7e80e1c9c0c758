"""What an operator of the traced program is called with, as the graph sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from lorgnette.errors import ConfigError
from lorgnette.targets.onnx.graph import GraphBuilder


@dataclass(frozen=True)
class Parameter:
    """A weight that no graph value stands for yet: the operator decides how it is stored."""

    name: str


class DynamicSize:
    """A size known only at run time."""


Known = Mapping[torch.fx.Node, object]
Translation = Callable[[GraphBuilder, torch.fx.Node, Known], object]


def graph_value(builder: GraphBuilder, known: Known, argument: object) -> ir.Value:
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


def weight_name(builder: GraphBuilder, known: Known, argument: object) -> str:
    """The name of the weight that an argument is.

    Raises:
        ConfigError: It is computed.
    """
    found = known[argument] if isinstance(argument, torch.fx.Node) else argument
    if not isinstance(found, Parameter):
        raise ConfigError("operand is not a weight", where=builder.component.name, got=argument)
    return found.name


def traced_shape(argument: object) -> torch.Size | None:
    """The shape of an argument in the traced program, None for a number."""
    return argument.meta["val"].shape if isinstance(argument, torch.fx.Node) else None
