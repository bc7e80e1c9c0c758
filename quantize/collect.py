"""Taking down what the matrices of a running module are multiplied with."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lorgnette.quantize.inputs import LayerInputs

Array = NDArray[np.float32]
ROWS = 512
"""The most positions that are kept as they are."""
TURN, FULL = 2654435769, 1 << 32
"""The golden section of a whole turn: so far does each position lie from the one before."""


class _Seen:
    """Running statistics of one input."""

    def __init__(self, channels: int, moment: bool) -> None:
        self.count = 0
        self.below = FULL
        self.moment = torch.zeros(channels, channels) if moment else None
        self.size = torch.zeros(channels, dtype=torch.float64)
        self.lowest = torch.full((channels,), torch.inf)
        self.highest = torch.full((channels,), -torch.inf)
        self.rows: list[Tensor] = [torch.empty(0, channels)]
        self.turns: list[Tensor] = [torch.empty(0, dtype=torch.int64)]

    def add(self, x: Tensor) -> None:
        """Shapes: `[T, C]`."""
        self.size += x.abs().sum(0, dtype=torch.float64)
        self.lowest = torch.minimum(self.lowest, x.amin(0))
        self.highest = torch.maximum(self.highest, x.amax(0))
        if self.moment is not None:
            self.moment.addmm_(x.T, x)
        self._keep_some(x)
        self.count += len(x)

    def _keep_some(self, x: Tensor) -> None:
        """Keeps the positions that fall into the first part of a turn, halved until few do.

        Such positions lie evenly, and, unlike every so-manieth, not all in one column of patches.
        Which they are depends on how many there have been, not on how they came.
        """
        turns = torch.arange(self.count, self.count + len(x)) * TURN % FULL
        chosen = turns < self.below
        self.rows.append(x[chosen])
        self.turns.append(turns[chosen])
        while sum(map(len, self.rows)) > ROWS:
            self.below //= 2
            turns = torch.cat(self.turns)
            self.rows = [torch.cat(self.rows)[turns < self.below]]
            self.turns = [turns[turns < self.below]]

    def inputs(self) -> LayerInputs:
        channels = len(self.size)
        moment = self.moment if self.moment is not None else torch.zeros(0, channels)
        largest = torch.maximum(self.lowest.abs(), self.highest.abs())
        return LayerInputs(
            count=self.count,
            second_moment=(moment / self.count).numpy(),
            mean_size=(self.size / self.count).to(torch.float32).numpy(),
            largest=largest.numpy(),
            lowest=float(self.lowest.min()),
            highest=float(self.highest.max()),
            rows=torch.cat(self.rows).numpy(),
        )


class Collector:
    """Hooks on linear layers; matrices that are given the same tensor share what is taken down."""

    def __init__(self, module: nn.Module, names: Sequence[str], *, moments: bool) -> None:
        """Prepares hooks.

        Args:
            module: What will run.
            names: Its matrices to watch, `*.weight`.
            moments: Whether second moments are wanted, which take most of the time.
        """
        self._module = module
        self._names = names
        self._moments = moments
        self._seen: dict[str, _Seen] = {}
        self._owner: dict[str, str] = {}
        self._now: dict[int, str] = {}
        self._held: list[Tensor] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Collector:
        """Attaches the hooks."""
        layers = dict(self._module.named_modules())
        for name in self._names:
            layer = layers[name.removesuffix("weight").removesuffix(".")]
            self._hooks.append(
                layer.register_forward_pre_hook(lambda _, x, name=name: self._take(name, x[0]))
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Takes them off."""
        for hook in self._hooks:
            hook.remove()

    def _take(self, name: str, x: Tensor) -> None:
        owner = self._owner.setdefault(name, self._now.get(id(x), name))
        if owner != name:
            return
        self._now[id(x)] = name
        self._held.append(x)  # so that no other tensor takes its id during this run
        if name not in self._seen:
            self._seen[name] = _Seen(x.shape[-1], self._moments)
        self._seen[name].add(x.reshape(-1, x.shape[-1]))

    def end_of_sample(self) -> None:
        """Says that one run of the module is over."""
        self._now.clear()
        self._held.clear()

    def inputs(self) -> dict[str, LayerInputs]:
        """What was seen, by matrix."""
        made = {name: seen.inputs() for name, seen in self._seen.items()}
        return {name: made[self._owner[name]] for name in self._names}


def rescaled(inputs: LayerInputs, factors: Array) -> LayerInputs:
    """The same inputs with each channel divided by its factor."""
    rows = inputs.rows / factors
    largest = inputs.largest / factors
    most = float(largest.max(initial=0.0))
    # The ends of each channel are not kept: a tenth more than the rows that are, at most the most.
    lowest = max(-most, 1.1 * float(rows.min(initial=0.0)))
    highest = min(most, 1.1 * float(rows.max(initial=0.0)))
    moment = inputs.second_moment
    if len(moment):
        moment = moment / factors[:, None] / factors
    return LayerInputs(
        count=inputs.count,
        second_moment=moment,
        mean_size=inputs.mean_size / factors,
        largest=largest,
        lowest=lowest,
        highest=highest,
        rows=rows,
    )
