"""Only channels that stand out are rescaled; all others stay as they are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lorgnette.quantize.scaling import smoothquant
from lorgnette.quantize.scaling.site import SiteWeights

STANDS_OUT = np.float32(4)
"""Times, or parts of, the median factor from which on a channel is taken for an outlier.

Measured on the zoo: evening out all channels costs what it wins where there are no outliers, and
outliers that matter are ten times as large and more.
"""


def factors(site: SiteWeights) -> NDArray[np.float32]:
    """SmoothQuant's factors from 4 times the median on, and from a quarter down; else 1.

    The inputs of a group share a scale, and so do its weights: one channel with large inputs and
    small weights takes the codes of all others, and loses its own. Those are brought back among
    the rest. Channels that are not like that keep their scales, so that a model without outliers
    is rounded as if it had not been looked at.

    Shapes: float32 `[channels]`.
    Source: the factors are those of Xiao et al. 2022, "SmoothQuant", arXiv 2211.10438, equation 4.
    """
    found = smoothquant.factors(site)
    inside = (found < STANDS_OUT) & (found > 1 / STANDS_OUT)
    return np.where(inside, np.float32(1), found)
