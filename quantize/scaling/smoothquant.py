"""SmoothQuant: the largest inputs and the largest weights of a channel are brought together."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lorgnette.quantize.scaling.site import SiteWeights, balanced

MIGRATION = 0.5
"""How much of the difficulty moves from the inputs to the weights; the authors' usual value."""


def factors(site: SiteWeights, migration: float = MIGRATION) -> NDArray[np.float32]:
    """Factors `max|x|**a / max|w|**(1 - a)`, so that outliers of inputs can be rounded too.

    With a the migration, 0 to 1; the maxima are those over all positions, and over the weights of
    all consumers. The median of the factors is made 1.

    Shapes: float32 `[channels]`.
    Source: Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for
    Large Language Models", arXiv 2211.10438, equation 4.
    """
    weights = np.max([np.abs(matrix).max(axis=0) for matrix in site.consumers], axis=0)
    return balanced(
        site.largest_by_channel(site.inputs.largest), site.largest_by_channel(weights), migration
    )
