"""Weight maps: from published tensor names to our parameters, as data and strict both ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

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
class Stack:
    """Rows of several published tensors, one below the other, as one matrix."""

    parts: tuple[tuple[str, int], ...]
    """Published name (or prefix) and rows of each."""


@dataclass(frozen=True)
class Computed:
    """A tensor that no checkpoint holds: a table or a constant."""

    make: Callable[[], torch.Tensor]


Rule = str | Flatten | Stack | Computed
"""Where a parameter comes from; a str is the published name (or prefix) as it is."""


@dataclass(frozen=True)
class Part:
    """One published tensor and the shape that it must have."""

    name: str
    shape: tuple[int, ...]


class ParameterSource(Protocol):
    """The parameters of one component, read one by one."""

    shapes: Mapping[str, tuple[int, ...]]

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter as float32, in the shape of the module."""


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
        self.shapes: Mapping[str, tuple[int, ...]] = dict(shapes)
        self._parts: dict[str, tuple[Part, ...]] = {}
        self._computed: dict[str, Computed] = {}
        for name, shape in shapes.items():
            resolved = resolve_rule(name, shape, rules)
            if isinstance(resolved, Computed):
                self._computed[name] = resolved
                continue
            self._parts[name] = resolved
            for part in resolved:
                self._check(part)

    def used_tensors(self) -> set[str]:
        """Published names that this component reads."""
        return {part.name for parts in self._parts.values() for part in parts}

    def origin(self, name: str) -> str | None:
        """The published names behind a parameter, None for a computed one.

        Two parameters of one origin hold the same numbers, so a target stores them once.
        """
        parts = self._parts.get(name)
        return None if parts is None else "+".join(part.name for part in parts)

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter as float32, in the shape of the module."""
        if name in self._computed:
            return self._computed[name].make().to(torch.float32).reshape(self.shapes[name])
        values = [self._read(part) for part in self._parts[name]]
        value = values[0] if len(values) == 1 else torch.cat(values)
        return value.reshape(self.shapes[name])

    def array(self, name: str) -> Array:
        """`tensor` as numpy."""
        return self.tensor(name).numpy()

    def _read(self, part: Part) -> torch.Tensor:
        value = self.checkpoint.read(part.name)
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"tensor '{part.name}' holds values that are not finite",
                where=self.checkpoint.path,
            )
        return value

    def _check(self, part: Part) -> None:
        info = self.checkpoint.tensors.get(part.name)
        if info is None:
            raise CheckpointError(
                f"tensor '{part.name}' is missing",
                where=self.checkpoint.path,
                hint="the config asks for it",
            )
        if info.shape != part.shape:
            raise CheckpointError(
                f"tensor '{part.name}' has the wrong shape",
                where=self.checkpoint.path / info.shard,
                got=list(info.shape),
                wanted=list(part.shape),
            )


def resolve_rule(
    name: str, shape: tuple[int, ...], rules: Mapping[str, Rule]
) -> Computed | tuple[Part, ...]:
    """What a parameter of a shape is made of, layer number and suffix filled in.

    Raises:
        KeyError: No rule fits; a mistake in the family, not in the checkpoint.
    """
    number = next(iter(re.findall(r"\.(\d+)\.", name)), "")
    pattern, suffix = re.sub(r"\.\d+\.", ".{i}.", name), ""
    if pattern not in rules:
        pattern, _, leaf = pattern.rpartition(".")
        suffix = f".{leaf}"
    rule = rules[pattern]
    if isinstance(rule, Computed):
        return rule
    if isinstance(rule, Flatten):
        named: tuple[tuple[str, tuple[int, ...]], ...] = ((rule.source, rule.shape),)
    elif isinstance(rule, Stack):
        named = tuple((source, (rows, *shape[1:])) for source, rows in rule.parts)
    else:
        named = ((rule, shape),)
    return tuple(Part(source.replace("{i}", number) + suffix, wanted) for source, wanted in named)


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
            where=checkpoint.path / checkpoint.tensors[unread[0]].shard,
            hint="the checkpoint is not of the layout that its config names",
        )


def load_module(module: nn.Module, source: ParameterSource) -> nn.Module:
    """Fills a module built on the meta device; returns it in eval mode.

    Memory: all its parameters in float32.
    """
    state = {name: source.tensor(name) for name in source.shapes}
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)
