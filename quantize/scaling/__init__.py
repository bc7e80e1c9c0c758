"""Rescaling of channels before rounding: one file a method, with a function `factors(site)`.

A producer's channel is divided by its factor and the columns that consume it are multiplied, which
changes nothing but what rounding does to them.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol, cast

from lorgnette.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lorgnette.quantize.scaling.site import SiteWeights

SHARED = "site"


class ScalingMethod(Protocol):
    """What every module of this folder defines, but for the one that they share."""

    def factors(self, site: SiteWeights) -> NDArray[np.float32]:
        """One factor above 0 for each channel of a site, `[channels]`."""


def load_scaling(name: str) -> ScalingMethod:
    """The scaling method of a name, which is the name of its file.

    Raises:
        ConfigError: There is no such file; lists those that are there.
    """
    if not name.isidentifier() or name == SHARED or find_spec(f"{__name__}.{name}") is None:
        known = f"one of {', '.join(scaling_names())}"
        raise ConfigError("unknown scaling method", got=repr(name), wanted=known)
    return cast("ScalingMethod", importlib.import_module(f"{__name__}.{name}"))


def scaling_names() -> list[str]:
    """Every scaling method by name, without loading any."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != SHARED)
