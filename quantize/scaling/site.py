"""A place where channels can be rescaled, and what the methods ask of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorgnette.quantize.inputs import LayerInputs

Array = NDArray[np.float32]

WIDEST = np.float32(1e4)
"""How far a factor may be from the median of all: products then stay within float16."""


@dataclass(frozen=True, eq=False)
class SiteWeights:
    """The matrices that read the same channels.

    Attributes:
        consumers: float32 `[rows_i, columns]`, as they are before any rescale.
        channel_of_column: `[columns]`, the channel that each column reads: its own number, or,
            behind grouped-query attention, the same for the columns of several heads.
        inputs: What calibration saw of the columns' inputs.
        round: Rounds the rescaled matrix of a consumer, by its number, to its scheme and gives
            back the weights that remain.
        round_inputs: Rounds inputs `[R, columns]` as the engine will; None where it does not.
    """

    consumers: tuple[Array, ...]
    channel_of_column: NDArray[np.int64]
    inputs: LayerInputs
    round: Callable[[Array, int], Array]
    round_inputs: Callable[[Array], Array] | None = None

    @property
    def channels(self) -> int:
        """How many channels there are."""
        return int(self.channel_of_column.max()) + 1

    def mean_by_channel(self, of_columns: Array) -> Array:
        """The mean of the columns of each channel, `[channels]`."""
        columns = np.bincount(self.channel_of_column, minlength=self.channels)
        sums = np.bincount(self.channel_of_column, of_columns, self.channels)
        return (sums / np.maximum(columns, 1)).astype(np.float32)

    def largest_by_channel(self, of_columns: Array) -> Array:
        """The largest of the columns of each channel, `[channels]`."""
        most = np.zeros(self.channels, np.float32)
        np.maximum.at(most, self.channel_of_column, of_columns)
        return most


def balanced(inputs: Array, weights: Array, share: float) -> Array:
    """Factors `inputs**share / weights**(1 - share)`, their median 1, bounded.

    A channel whose inputs or weights are all 0 gets 1. Where the inputs of a channel are c times as
    large and its weights c times as small, its factor is c times as large, whatever the share: so
    a rescale that made outliers is undone.

    Shapes: `inputs` and `weights` are sizes of each channel, `[channels]`.
    """
    alive = (inputs > 0) & (weights > 0)
    if not alive.any():
        return np.ones_like(inputs)
    logs = share * np.log(inputs[alive].astype(np.float64))
    logs -= (1 - share) * np.log(weights[alive].astype(np.float64))
    logs -= np.median(logs)
    found = np.ones_like(inputs)
    found[alive] = np.clip(np.exp(np.clip(logs, -20, 20)), 1 / WIDEST, WIDEST)
    return found
