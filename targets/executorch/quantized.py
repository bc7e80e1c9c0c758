"""Matrices as ExecuTorch knows them: codes and scales of a plan, never the library's choice."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from lorgnette.quantize.scheme import QuantTensor

MIDDLE = {4: 8, 8: 128}
"""The code that means 0, by bits: what XNNPACK reads are codes less this."""


INT8 = (-128, 127, torch.int8)


def rounded(x: Tensor) -> Tensor:
    """Inputs rounded to int8 with a scale and a zero point for each position.

    Once for every matrix: XNNPACK's partitioner puts matrices that share rounded inputs in pieces
    of their own.
    """
    ops = torch.ops.quantized_decomposed
    scale, zero = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
    codes = ops.quantize_per_token(x, scale, zero, *INT8)
    return ops.dequantize_per_token(codes, scale, zero, *INT8, torch.float32)  # type: ignore[no-any-return]


class TokenLinear(nn.Module):
    """A linear layer with integer weights whose inputs are rounded position by position.

    Written in the operators that XNNPACK's partitioner takes for its dynamic kernels: weights int8
    by channel or int4 in groups. Those kernels take positive scales only, and ours may be negative
    (the largest weight of a group has the code of largest magnitude, which is negative). So, by
    channel, rows of negative scales come out with the other sign and are turned round behind. In
    groups, codes c of a negative scale are stored as 15 - c with the scale's magnitude: with
    (8 - c) s = (15 - c - 8) s + s, what is missing is s times the sum of the group's inputs, a
    product with one column a group.

    Shapes: `[..., columns]` to `[..., rows]`.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    signs: Tensor | None
    missing: Tensor | None

    def __init__(self, made: QuantTensor, bias: Tensor | None) -> None:
        """Takes over the codes of a symmetric scheme whose groups fill the columns."""
        super().__init__()
        self.bits, self.group = made.scheme.bits, made.scheme.group_size
        codes, scales = signed_codes(made), torch.from_numpy(kernel_scales(made))
        turned = torch.from_numpy(made.scales) < 0
        signs = missing = None
        if self.group and turned.any():
            columns = turned.repeat_interleave(self.group, dim=1)
            codes = torch.where(columns, -1 - codes, codes)
            missing = torch.where(turned, scales, 0.0)
        elif turned.any():
            signs = torch.where(turned[:, 0], -1.0, 1.0)
            bias = None if bias is None else bias * signs
        self.register_buffer("signs", signs)
        self.register_buffer("missing", missing)
        self.codes = nn.Buffer(codes)
        self.scales = nn.Buffer(scales if self.group else scales[:, 0].contiguous())
        # What the partitioner looks for is int32 for groups, int64 by channel.
        kind = torch.int32 if self.group else torch.int64
        self.zeros = nn.Buffer(torch.zeros(self.scales.shape, dtype=kind))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor, sums: Tensor | None = None) -> Tensor:
        """Rounds the inputs and multiplies; `sums` are those of groups of rounded inputs."""
        ops, high = torch.ops.quantized_decomposed, MIDDLE[self.bits] - 1
        span = (-high - 1, high, torch.int8)
        of = (self.codes, self.scales, self.zeros)
        if self.group:
            weight = ops.dequantize_per_channel_group(*of, *span, self.group, torch.float32)
        else:
            weight = ops.dequantize_per_channel(*of, 0, *span)
        out = functional.linear(rounded(x), weight, self.bias)
        if self.signs is not None:
            out = out * self.signs
        if self.missing is not None and sums is not None:
            out = out + functional.linear(sums, self.missing)
        return out


class TokenLinears(nn.Module):
    """One or several `TokenLinear` of the same inputs, and sums of these where they are needed."""

    ones: Tensor | None

    def __init__(self, parts: list[TokenLinear], *, single: bool) -> None:
        """Joins them; a single one gives a tensor in place of a list."""
        super().__init__()
        self.parts, self.single = nn.ModuleList(parts), single
        self.register_buffer("ones", None)
        if any(part.missing is not None for part in parts):
            groups = parts[0].scales.shape[1]
            ones = torch.eye(groups, dtype=torch.int8).repeat_interleave(parts[0].group, dim=1)
            self.register_buffer("ones", ones)
            self.ones_scale = nn.Buffer(torch.ones(groups))
            self.ones_zero = nn.Buffer(torch.zeros(groups, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Multiplies with each."""
        sums = None
        if self.ones is not None:
            # As int8, so that what is summed are the rounded inputs.
            of = (self.ones, self.ones_scale, self.ones_zero)
            ones = torch.ops.quantized_decomposed.dequantize_per_channel(*of, 0, *INT8)
            sums = functional.linear(rounded(x), ones)
        found = [part(x, sums) for part in self.parts]
        return found[0] if self.single else found


class CodedEmbedding(nn.Module):
    """A table of 4 or 8 bits in groups, of which rows are looked up.

    Shapes: int64 `[1, T]` to float32 `[1, T, columns]`.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, made: QuantTensor) -> None:
        """Takes over the codes of a symmetric scheme whose groups fill the columns."""
        super().__init__()
        self.bits = made.scheme.bits
        codes = table_bytes(made.codes) if self.bits == 4 else signed_codes(made)
        self.codes = nn.Buffer(torch.as_tensor(codes))
        self.scales = nn.Buffer(torch.from_numpy(made.scales.copy()))

    def forward(self, token_ids: Tensor) -> Tensor:
        """Looks the tokens up."""
        ops, high = torch.ops.quantized_decomposed, MIDDLE[self.bits] - 1
        look_up = ops.embedding_4bit if self.bits == 4 else ops.embedding_byte
        return look_up(self.codes, self.scales, None, -high - 1, high, token_ids)  # type: ignore[no-any-return]


LEAST_SCALE = float(np.finfo(np.float32).tiny)
"""Stands for a scale of 0, which XNNPACK refuses: codes of such a group mean 0 anyway."""


def magnitudes(made: QuantTensor) -> NDArray[np.float32]:
    """Scales without their signs, none of them 0."""
    found: NDArray[np.float32] = np.maximum(np.abs(made.scales), np.float32(LEAST_SCALE))
    return found


def kernel_scales(made: QuantTensor) -> NDArray[np.float32]:
    """Scales as XNNPACK keeps them: positive, those of groups rounded to bfloat16."""
    scales = magnitudes(made)
    if not made.scheme.group_size:
        return scales
    return torch.from_numpy(scales).to(torch.bfloat16).to(torch.float32).numpy()


def signed_codes(made: QuantTensor) -> Tensor:
    """Codes less the one that means 0, int8 `[rows, columns]`."""
    codes = made.codes[:, : made.columns].astype(np.int16) - MIDDLE[made.scheme.bits]
    return torch.from_numpy(codes.astype(np.int8))


def table_bytes(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes of 4 bits, two a byte, the first in the high bits."""
    packed: NDArray[np.uint8] = codes[:, 0::2] << np.uint8(4) | codes[:, 1::2]
    return packed
