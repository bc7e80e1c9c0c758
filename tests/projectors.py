"""Projectors in plain functional torch on published names, and random weights for them.

Written from the papers' figures and the published tensor names, not from `export/layers`, so that
one misreading cannot hide in both: convolutions stay convolutions here, activations are spelled
out, and pictures keep their four axes to the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

Weights = Mapping[str, Tensor]


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


def two_layers(weights: Weights, first: str, second: str, x: Tensor, *, tanh: bool) -> Tensor:
    """Linear, GELU, linear."""
    inner = x @ weights[f"{first}.weight"].T + weights[f"{first}.bias"]
    if tanh:
        curve = math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)
        inner = 0.5 * inner * (1 + torch.tanh(curve))
    else:
        inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
    return inner @ weights[f"{second}.weight"].T + weights[f"{second}.bias"]


def picture(x: Tensor) -> Tensor:
    """Tokens `[B, side * side, C]` to `[B, C, side, side]`."""
    side = math.isqrt(x.shape[1])
    return torch.stack([tokens.T.unflatten(1, (side, side)) for tokens in x])


def channel_norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    """Layer norm over the channels of `[B, C, H, W]`, in float64."""
    wide = x.double()
    centred = wide - wide.mean(1, keepdim=True)
    scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    gain, shift = (weights[f"{name}.{part}"][None, :, None, None] for part in ("weight", "bias"))
    return (scaled * gain + shift).float()


def depthwise3(weight: Tensor, x: Tensor, stride: int) -> Tensor:
    """A 3 x 3 convolution channel by channel, one zero around, by nine shifted products."""
    rows, columns = x.shape[2:]
    padded = functional.pad(x, (1, 1, 1, 1))
    out = torch.zeros_like(x)
    for row in range(3):
        for column in range(3):
            part = padded[:, :, row : row + rows, column : column + columns]
            out += weight[:, 0, row, column][None, :, None, None] * part
    return out[:, :, ::stride, ::stride]


def inverted_residual(weights: Weights, block: str, x: Tensor, stride: int) -> Tensor:
    """One of LDP's two blocks on `[B, C, H, W]`."""
    y = channel_norm(weights, f"{block}0.1", depthwise3(weights[f"{block}0.0.weight"], x, stride))
    y = y * (y + 3).clamp(0, 6) / 6
    gate = functional.adaptive_avg_pool2d(y, 1)
    gate = functional.conv2d(gate, weights[f"{block}1.fc1.weight"], weights[f"{block}1.fc1.bias"])
    gate = gate.clamp(min=0)
    gate = functional.conv2d(gate, weights[f"{block}1.fc2.weight"], weights[f"{block}1.fc2.bias"])
    y = y * ((gate + 3).clamp(0, 6) / 6)
    y = channel_norm(weights, f"{block}2.1", functional.conv2d(y, weights[f"{block}2.0.weight"]))
    return x + y if stride == 1 else y


def ldp(weights: Weights, prefix: str, x: Tensor) -> Tensor:
    """MobileVLM v1's projector on tokens `[B, P, D]`."""
    tower = f"{prefix}model.mlp."
    y = picture(two_layers(weights, f"{tower}1", f"{tower}3", x, tanh=False))
    y = inverted_residual(weights, f"{prefix}model.mb_block.1.block.", y, 1)
    y = inverted_residual(weights, f"{prefix}model.mb_block.2.block.", y, 2)
    return y.flatten(2).mT


def ldpv2(weights: Weights, prefix: str, x: Tensor) -> Tensor:
    """MobileVLM V2's projector on tokens `[B, P, D]`."""
    y = picture(two_layers(weights, f"{prefix}mlp.mlp.0", f"{prefix}mlp.mlp.2", x, tanh=False))
    y = functional.adaptive_avg_pool2d(y, y.shape[2] // 2)
    positions = depthwise3(weights[f"{prefix}peg.peg.0.weight"], y, 1)
    positions = positions + weights[f"{prefix}peg.peg.0.bias"][None, :, None, None]
    return (positions + y).flatten(2).mT


def concat(weights: Weights, prefix: str, x: Tensor, joined: int) -> Tensor:
    """OmniVLM's projector on tokens `[B, P, D]`."""
    joints = [torch.cat(list(group), dim=0) for tokens in x for group in tokens.split(joined)]
    y = torch.stack(joints).unflatten(0, (len(x), -1))
    return two_layers(weights, f"{prefix}0", f"{prefix}2", y, tanh=True)
