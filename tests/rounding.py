"""What rounding of activations means, in plain torch: the oracle of graphs that do it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorgnette.quantize.plan import QuantPlan


def rounded(x: Tensor, width: int) -> Tensor:
    """`x` rounded to 8 bits, symmetric, with a scale for each `width` numbers of the last axis."""
    columns = x.shape[-1]
    groups = functional.pad(x, (0, -columns % width)).reshape(*x.shape[:-1], -1, width)
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 127 / largest, 0.0)
    back = torch.round(groups * inverse) * (largest / 127)
    return back.flatten(-2)[..., :columns]


class RoundedInput(nn.Module):
    """A linear layer whose input is first rounded to 8 bits."""

    def __init__(self, layer: nn.Linear, width: int) -> None:
        super().__init__()
        self.layer = layer
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(rounded(x, self.width))  # type: ignore[no-any-return]


def round_inputs(module: nn.Module, plan: QuantPlan, component: str, prefix: str = "") -> None:
    """Makes every linear layer below round its input as a plan says of its weight."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            scheme = plan.scheme_for(component, f"{prefix}{name}.weight")
            if scheme.activations != "float":
                by_group = scheme.activations == "int8_group"
                width = scheme.group_size if by_group else child.in_features
                setattr(module, name, RoundedInput(child, width))
        else:
            round_inputs(child, plan, component, f"{prefix}{name}.")
