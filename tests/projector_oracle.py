"""The published projectors as plain torch functions over their published tensor names.

An oracle for the modules of `lorgnette.export` and for the zoo: it shares no code with either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

MOBILEVLM, OMNIVLM = "model.mm_projector.", "multi_modal_projector."


def ldp(tensors: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """MobileVLM's first projector: two linear layers, then two inverted residual blocks.

    Source: github.com/Meituan-AutoML/MobileVLM, mobilevlm/model/vision_projector.py, LDPBlock.

    Shapes:
        features: [B, N, D], N square. returns: [B, N / 4, C].
    """
    at = MOBILEVLM + "model."
    x = _linear(tensors, at + "mlp.3", F.gelu(_linear(tensors, at + "mlp.1", features)))
    x = _as_map(x)
    x = x + _inverted_residual(tensors, at + "mb_block.1.block.", x, 1)
    x = _inverted_residual(tensors, at + "mb_block.2.block.", x, 2)
    return x.flatten(2).transpose(1, 2)


def ldp_v2(tensors: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """MobileVLM V2's projector: two linear layers, a mean over 2x2, a depthwise 3x3 with skip.

    Source: the same file, LDPNetV2Projector.

    Shapes:
        features: [B, N, D], N square. returns: [B, N / 4, C].
    """
    at = MOBILEVLM
    x = _linear(tensors, at + "mlp.mlp.2", F.gelu(_linear(tensors, at + "mlp.mlp.0", features)))
    x = F.avg_pool2d(_as_map(x), 2)
    peg = at + "peg.peg.0."
    weight, bias = tensors[peg + "weight"], tensors[peg + "bias"]
    x = x + F.conv2d(x, weight, bias, padding=1, groups=x.shape[1])
    return x.flatten(2).transpose(1, 2)


def omnivlm(tensors: Mapping[str, Tensor], features: Tensor, group: int) -> Tensor:
    """OmniVLM's projector: `group` consecutive tokens side by side, then two linear layers.

    Source: the published mmproj's graph; 9 tokens to a group, or 1 in nano-vlm-instruct.

    Shapes:
        features: [B, N, D], row by row. returns: [B, N / group, C].
    """
    batch, count, width = features.shape
    x = features.reshape(batch, count // group, group * width)
    x = F.gelu(_linear(tensors, OMNIVLM + "0", x), approximate="tanh")
    return _linear(tensors, OMNIVLM + "2", x)


def _inverted_residual(tensors: Mapping[str, Tensor], at: str, x: Tensor, stride: int) -> Tensor:
    """Depthwise 3x3, squeeze and excitation, pointwise; norms over channels.

    Shapes:
        x: [B, C, S, S]. returns: [B, C, S / stride, S / stride].
    """
    weight = tensors[at + "0.0.weight"]
    x = F.conv2d(x, weight, stride=stride, padding=1, groups=x.shape[1])
    x = F.hardswish(_channel_norm(tensors, at + "0.1", x))
    gate = F.relu(_conv(tensors, at + "1.fc1", x.mean((2, 3), keepdim=True)))
    x = x * F.hardsigmoid(_conv(tensors, at + "1.fc2", gate))
    return _channel_norm(tensors, at + "2.1", F.conv2d(x, tensors[at + "2.0.weight"]))


def _channel_norm(tensors: Mapping[str, Tensor], at: str, x: Tensor) -> Tensor:
    weight, bias = tensors[at + ".weight"], tensors[at + ".bias"]
    return F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, 1e-5).permute(0, 3, 1, 2)


def _conv(tensors: Mapping[str, Tensor], at: str, x: Tensor) -> Tensor:
    return F.conv2d(x, tensors[at + ".weight"], tensors[at + ".bias"])


def _linear(tensors: Mapping[str, Tensor], at: str, x: Tensor) -> Tensor:
    return F.linear(x, tensors[at + ".weight"], tensors[at + ".bias"])


def _as_map(x: Tensor) -> Tensor:
    """[B, N, C] as [B, C, S, S]."""
    side = math.isqrt(x.shape[1])
    return x.transpose(1, 2).reshape(len(x), -1, side, side)
