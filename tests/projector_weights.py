"""Published names and shapes of the projectors, and random weights for them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Weights that keep values at order one; norms around one, biases small."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            made[name] = values / math.sqrt(math.prod(shape[1:]))
        else:
            made[name] = 0.3 * values + (1.0 if is_gain(name, shapes) else 0.0)
    return made


def is_gain(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a vector multiplies: a norm's weight."""
    return name.endswith(".weight") and len(shapes[name]) == 1


def ldp_shapes(prefix: str, eye: int, width: int, squeezed: int) -> dict[str, tuple[int, ...]]:
    """Published tensors of LDP, MobileVLM v1."""
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}model.mlp.1.weight": (width, eye),
        f"{prefix}model.mlp.1.bias": (width,),
        f"{prefix}model.mlp.3.weight": (width, width),
        f"{prefix}model.mlp.3.bias": (width,),
    }
    for block in ("1", "2"):
        inside = f"{prefix}model.mb_block.{block}.block."
        shapes |= {
            f"{inside}0.0.weight": (width, 1, 3, 3),
            f"{inside}0.1.weight": (width,),
            f"{inside}0.1.bias": (width,),
            f"{inside}1.fc1.weight": (squeezed, width, 1, 1),
            f"{inside}1.fc1.bias": (squeezed,),
            f"{inside}1.fc2.weight": (width, squeezed, 1, 1),
            f"{inside}1.fc2.bias": (width,),
            f"{inside}2.0.weight": (width, width, 1, 1),
            f"{inside}2.1.weight": (width,),
            f"{inside}2.1.bias": (width,),
        }
    return shapes


def ldpv2_shapes(prefix: str, eye: int, width: int) -> dict[str, tuple[int, ...]]:
    """Published tensors of LDPv2, MobileVLM V2."""
    return {
        f"{prefix}mlp.mlp.0.weight": (width, eye),
        f"{prefix}mlp.mlp.0.bias": (width,),
        f"{prefix}mlp.mlp.2.weight": (width, width),
        f"{prefix}mlp.mlp.2.bias": (width,),
        f"{prefix}peg.peg.0.weight": (width, 1, 3, 3),
        f"{prefix}peg.peg.0.bias": (width,),
    }


def concat_shapes(
    prefix: str, eye: int, joined: int, hidden: int, width: int
) -> dict[str, tuple[int, ...]]:
    """Published tensors of OmniVLM's projector."""
    return {
        f"{prefix}0.weight": (hidden, eye * joined),
        f"{prefix}0.bias": (hidden,),
        f"{prefix}2.weight": (width, hidden),
        f"{prefix}2.bias": (width,),
    }
