"""A component's module with its weights in place, in the operators of ExecuTorch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from torch import Tensor, nn

from lorgnette.export.component import Component
from lorgnette.export.trace import build_module
from lorgnette.quantize.scheme import QuantTensor
from lorgnette.quantize.store import QuantizedSource
from lorgnette.targets.executorch.modules import SplitLinear, rewritten
from lorgnette.targets.executorch.quantized import (
    CodedEmbedding,
    TokenLinear,
    TokenLinears,
    kernel_scales,
    magnitudes,
)
from lorgnette.targets.executorch.schemes import why_float

HALVES = "matrices of float16 are stored as float32 of the same numbers"


class Builder:
    """Makes the module of one component.

    Attributes:
        weight_bytes: Bytes of weights by storage form.
        kept_in_float: Matrices of integer schemes that are stored as floats, with the reason.
        exceptions: What is carried otherwise than the plan says, a line each.
        pieces: The layers that each matrix of integers became, by its name.
    """

    def __init__(
        self,
        component: Component,
        source: QuantizedSource,
        *,
        norms: bool = True,
    ) -> None:
        """Starts with nothing read.

        Args:
            component: What is lowered.
            source: Its weights, and how they are rounded.
            norms: Whether norms are written out in steps.
        """
        self.weight_bytes: Counter[str] = Counter()
        self.kept_in_float: dict[str, str] = {}
        self.exceptions: list[str] = []
        self.pieces: dict[str, list[TokenLinear]] = {}
        self._component, self._norms = component, norms
        self._source = source

    def build(self) -> nn.Module:
        """The module, ready to be traced."""
        module = build_module(self._component)
        for name in self._source.shapes:
            if name not in self._source.matrices:
                self._fill(module, name)
        return self._replaced(module, "").eval().requires_grad_(False)

    def _fill(self, module: nn.Module, name: str) -> None:
        """Puts a parameter or buffer in its place."""
        owner, _, leaf = name.rpartition(".")
        place = module.get_submodule(owner)
        value = self._source.tensor(name).clone()
        self.weight_bytes["float32"] += value.numel() * 4
        parameter = leaf in dict(place.named_parameters(recurse=False))
        setattr(place, leaf, _constant(value) if parameter else nn.Buffer(value))

    def _replaced(self, module: nn.Module, name: str) -> nn.Module:
        """A module in the target's operators, with all that is in it."""
        made = rewritten(module, norms=self._norms)
        splits: dict[str, list[int]] = getattr(made, "splits", {})
        for child_name, child in list(made.named_children()):
            full = f"{name}.{child_name}" if name else child_name
            setattr(made, child_name, self._child(child, full, splits.get(child_name)))
        return made

    def _child(self, child: nn.Module, name: str, split: list[int] | None) -> nn.Module:
        weight = f"{name}.weight"
        if weight not in self._source.matrices:
            return self._replaced(child, name)
        if isinstance(child, nn.Embedding):
            return self._table(weight)
        bias: Tensor | None = child.bias  # type: ignore[assignment]
        return self._linear(weight, bias, split)

    def _linear(self, weight: str, bias: Tensor | None, wanted: list[int] | None) -> nn.Module:
        """A linear layer, or one that gives as many results as rows are split to."""
        single, split = wanted is None, wanted or [self._source.shapes[weight][0]]
        codes = self._codes(weight)
        biases: list[Tensor | None] = [None] * len(split)
        if bias is not None:
            biases = [part.clone() for part in torch.split(bias.detach(), split)]
        if codes is None:
            values = torch.split(self._float(weight), split)
            pairs = zip(values, biases, strict=True)
            layers = [_linear(value.clone(), part) for value, part in pairs]
            return layers[0] if single else SplitLinear(layers)
        made, start = [], 0
        for rows, part in zip(split, biases, strict=True):
            made.append(TokenLinear(_rows(codes, start, start + rows), part))
            start += rows
            missing = made[-1].missing
            self.weight_bytes["float32"] += 0 if missing is None else 4 * missing.numel()
        self.pieces[weight] = made
        return TokenLinears(made, single=single)

    def _table(self, weight: str) -> nn.Module:
        codes = self._codes(weight, gathered=True)
        if codes is not None:
            return CodedEmbedding(codes)
        rows, columns = self._source.shapes[weight]
        table = nn.Embedding(rows, columns, device="meta")
        table.weight = _constant(self._float(weight))
        return table

    def _codes(self, weight: str, *, gathered: bool = False) -> QuantTensor | None:
        """The codes of a matrix; None where it is stored as floats."""
        scheme, columns = self._source.rule(weight).scheme, self._source.shapes[weight][1]
        if not scheme.is_integer:
            return None
        reason = why_float(scheme, columns, gathered=gathered)
        if reason:
            self.kept_in_float[weight] = reason
            return None
        made = self._source.codes(weight)
        if not gathered and not np.array_equal(kernel_scales(made), magnitudes(made)):
            self.exceptions.append(f"scales of '{weight}' rounded to bfloat16")
        a_scale = 2 if scheme.group_size and not gathered else 4
        stored = made.codes.shape[0] * columns * scheme.bits // 8 + a_scale * made.scales.size
        self.weight_bytes[scheme.form] += stored
        return made

    def _float(self, weight: str) -> Tensor:
        if self._source.rule(weight).scheme.bits == 16 and HALVES not in self.exceptions:
            self.exceptions.append(HALVES)
        value = self._source.tensor(weight)
        self.weight_bytes["float32"] += value.numel() * 4
        return value


def _constant(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = _constant(weight)
    if bias is not None:
        layer.bias = _constant(bias)
    return layer


def _rows(made: QuantTensor, start: int, end: int) -> QuantTensor:
    part = slice(start, end)
    zeros = made.zero_points[part]
    return QuantTensor(made.codes[part], made.scales[part], zeros, made.columns, made.scheme)
