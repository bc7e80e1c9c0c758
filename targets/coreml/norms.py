"""Normalisations."""

from __future__ import annotations

import math
from typing import cast

import torch

from lorgnette.targets.coreml.builder import FunctionBuilder, Known, graph_value, weight_name
from lorgnette.targets.coreml.mil import Builder, Var

LARGEST_SHARE = 16.0
"""Largest value of sqrt(epsilon) over the scale: its square is exact enough in float16."""


def layer_norm(builder: FunctionBuilder, node: torch.fx.Node, known: Known) -> Var:
    """Layer normalisation over the last axis."""
    epsilon = cast("float", node.args[4]) if len(node.args) > 4 else 1e-5
    return Builder.layer_norm(
        x=graph_value(builder, known, node.args[0]),
        axes=[-1],
        gamma=builder.float_weight(weight_name(builder, known, node.args[2])),
        beta=builder.float_weight(weight_name(builder, known, node.args[3])),
        epsilon=builder.number(epsilon),
    )


def rms_norm(builder: FunctionBuilder, node: torch.fx.Node, known: Known) -> Var:
    """Root mean square normalisation over the last axis, safe in float16.

    Squares of float16 end at 65504, which is 256 squared, and residual streams go beyond. So each
    position is divided by its largest magnitude first:

        m = max(|x|), at least sqrt(eps) / 16
        y = x / m                       at most 1
        x / sqrt(mean(x^2) + eps) = y / sqrt(mean(y^2) + (sqrt(eps) / m)^2)

    The mean is then between 1 / D and 1, and the epsilon term at most 256: nothing overflows, and
    what underflows is too small to matter. Where the floor of m is reached the epsilon term is
    256 and the mean of squares at most 1 in it, as it should be. The float32 graph is the same.
    """
    x = graph_value(builder, known, node.args[0])
    weight = builder.float_weight(weight_name(builder, known, node.args[2]))
    root = math.sqrt(cast("float", node.args[3]))
    largest = Builder.reduce_max(x=Builder.abs(x=x), axes=[-1], keep_dims=True)
    largest = Builder.maximum(x=largest, y=builder.number(root / LARGEST_SHARE))
    y = Builder.real_div(x=x, y=largest)
    share = Builder.real_div(x=builder.number(root), y=largest)
    mean = Builder.reduce_mean(x=Builder.mul(x=y, y=y), axes=[-1], keep_dims=True)
    inner = Builder.add(x=mean, y=Builder.mul(x=share, y=share))
    scaled = Builder.mul(x=y, y=Builder.rsqrt(x=inner, epsilon=builder.number(0.0)))
    return Builder.mul(x=scaled, y=weight)
