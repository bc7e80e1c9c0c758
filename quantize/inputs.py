"""What calibration saw of the inputs of a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """Statistics of all positions of all samples.

    Attributes:
        count: Positions seen.
        second_moment: float32 `[C, C]`, the mean of `x xT`; `[0, C]` where nobody asked for it.
        mean_size: float32 `[C]`, the mean of `|x|`.
        largest: float32 `[C]`, the most of `|x|`.
        lowest: The least element of any channel.
        highest: The greatest.
        rows: float32 `[R, C]`, some of the positions, evenly taken.
    """

    count: int
    second_moment: Array
    mean_size: Array
    largest: Array
    lowest: float
    highest: float
    rows: Array
