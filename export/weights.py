"""Weight maps: from published tensor names to our parameters, as data and strict both ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lorgnette.errors import CheckpointError
from lorgnette.export.checkpoint import Checkpoint

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Flatten:
    """A published tensor whose trailing axes are flattened to one: a convolution as a matrix."""

    source: str
    shape: tuple[int, ...]
    """The published shape."""


@dataclass(frozen=True)
class Computed:
    """A tensor that no checkpoint holds: a table or a constant."""

    make: Callable[[], torch.Tensor]


Rule = str | Flatten | Computed
"""Where a parameter comes from; a str is the published name (or prefix) as it is."""


class WeightSource:
    """The parameters of one component, read on demand and never kept.

    Args:
        checkpoint: Where the tensors come from.
        shapes: The component's parameters and buffers, name to shape.
        rules: Parameter name, or the part before `.weight` / `.bias`, to its `Rule`. `{i}` stands
            for any layer number, the same on both sides.

    Raises:
        CheckpointError: A parameter has no rule, or its tensor is missing or of another shape.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        shapes: Mapping[str, tuple[int, ...]],
        rules: Mapping[str, Rule],
    ) -> None:
        """Resolves and checks every parameter; reads nothing."""
        self.checkpoint = checkpoint
        self.shapes = dict(shapes)
        self._rules = {name: resolve_rule(name, rules) for name in shapes}
        for name, rule in self._rules.items():
            if not isinstance(rule, Computed):
                self._check(name, rule)

    def used_tensors(self) -> set[str]:
        """Published names that this component reads."""
        origins = (self.origin(name) for name in self._rules)
        return {origin for origin in origins if origin is not None}

    def origin(self, name: str) -> str | None:
        """The published name behind a parameter, None for a computed one.

        Two parameters of one origin hold the same numbers, so a target stores them once.
        """
        rule = self._rules[name]
        if isinstance(rule, Computed):
            return None
        return rule.source if isinstance(rule, Flatten) else rule

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter as float32, in the shape of the module."""
        rule = self._rules[name]
        if isinstance(rule, Computed):
            value = rule.make().to(torch.float32)
        else:
            value = self.checkpoint.read(rule.source if isinstance(rule, Flatten) else rule)
        value = value.reshape(self.shapes[name])
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"tensor '{self.origin(name) or name}' holds values that are not finite",
                where=self.checkpoint.path,
            )
        return value

    def array(self, name: str) -> Array:
        """`tensor` as numpy."""
        return self.tensor(name).numpy()

    def _check(self, name: str, rule: str | Flatten) -> None:
        source = rule.source if isinstance(rule, Flatten) else rule
        wanted = rule.shape if isinstance(rule, Flatten) else self.shapes[name]
        info = self.checkpoint.tensors.get(source)
        if info is None:
            raise CheckpointError(
                f"tensor '{source}' is missing",
                where=self.checkpoint.path,
                hint="the config asks for it",
            )
        if info.shape != tuple(wanted):
            raise CheckpointError(
                f"tensor '{source}' has the wrong shape",
                where=self.checkpoint.path / info.shard,
                got=list(info.shape),
                wanted=list(wanted),
            )


def resolve_rule(name: str, rules: Mapping[str, Rule]) -> Rule:
    """The rule of one parameter, with layer numbers and suffix filled in.

    Raises:
        KeyError: No rule fits; a mistake in the family, not in the checkpoint.
    """
    numbers = re.findall(r"\.(\d+)\.", name)
    pattern = re.sub(r"\.\d+\.", ".{i}.", name)
    rule, suffix = rules.get(pattern), ""
    if rule is None:
        pattern, _, leaf = pattern.rpartition(".")
        rule, suffix = rules[pattern], f".{leaf}"
    number = numbers[0] if numbers else ""
    if isinstance(rule, str):
        return rule.replace("{i}", number) + suffix
    if isinstance(rule, Flatten):
        return Flatten(rule.source.replace("{i}", number), rule.shape)
    return rule


def module_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every parameter and buffer of a module, name to shape."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def check_all_used(
    checkpoint: Checkpoint, sources: Iterable[WeightSource], ignored: Mapping[str, str]
) -> None:
    """Refuses a checkpoint that holds tensors which no component reads.

    Args:
        checkpoint: The checkpoint.
        sources: All components' sources.
        ignored: Regular expressions of names that may stay unread, with the reason.

    Raises:
        CheckpointError: Naming the first unread tensor and how many there are.
    """
    used: set[str] = set()
    for source in sources:
        used |= source.used_tensors()
    unread = [
        name
        for name in checkpoint.tensors
        if name not in used and not any(re.fullmatch(pattern, name) for pattern in ignored)
    ]
    if unread:
        raise CheckpointError(
            f"{len(unread)} unknown tensor(s), first '{unread[0]}'",
            where=checkpoint.path,
            hint="the checkpoint is not of the layout that its config names",
        )


def load_module(module: nn.Module, source: WeightSource) -> nn.Module:
    """Fills a module built on the meta device; returns it in eval mode.

    Memory: all its parameters in float32.
    """
    state = {name: source.tensor(name) for name in source.shapes}
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)
