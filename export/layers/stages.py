"""How a module runs in steps, and where neighbouring matrices may trade factors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Site:
    """A place where each channel may be divided by a factor and multiplied by it further on.

    What the module computes stays the same: nothing but a linear map, or a product with a factor
    of its own, lies between.

    Attributes:
        name: What is divided, in short.
        divided: Parameters whose elements, or rows, are divided, and the first of those rows.
        consumers: Matrices whose input columns are multiplied.
        channel_of_column: int64 `[columns]`, the channel that each column of a consumer reads.
    """

    name: str
    divided: tuple[tuple[str, int], ...]
    consumers: tuple[str, ...]
    channel_of_column: NDArray[np.int64]

    @property
    def channels(self) -> int:
        """How many factors there are."""
        return int(self.channel_of_column.max()) + 1


@runtime_checkable
class HasSites(Protocol):
    """A module that knows its sites."""

    def sites(self) -> tuple[Site, ...]:
        """All of them."""


def plain_site(name: str, divided: tuple[str, ...], consumers: tuple[str, ...], width: int) -> Site:
    """A site of `width` channels whose column c reads channel c."""
    return Site(name, tuple((each, 0) for each in divided), consumers, np.arange(width))


@dataclass(frozen=True)
class Stage:
    """One step of a module.

    Attributes:
        prefix: What precedes its parameters' names, dot included.
        module: What runs, on the output of the stage before.
    """

    prefix: str
    module: nn.Module

    @property
    def sites(self) -> tuple[Site, ...]:
        """Its sites, by names without the prefix."""
        return self.module.sites() if isinstance(self.module, HasSites) else ()


def run_stages(stages: Iterable[Stage], x: Tensor) -> Tensor:
    """Runs them one after the other."""
    for stage in stages:
        x = stage.module(x)
    return x


class DropFirst(nn.Module):
    """Leaves out the first position, that of a class token.

    Shapes: `[B, P + 1, D]` to `[B, P, D]`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Cuts it off."""
        return x[:, 1:]
