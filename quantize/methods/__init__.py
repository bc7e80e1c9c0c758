"""Quantisation methods: one file each, with a function `quantize(weight, scheme)`."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol, cast

from lorgnette.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lorgnette.quantize.scheme import QuantScheme, QuantTensor


class Method(Protocol):
    """What every module of this folder defines."""

    def quantize(self, weight: NDArray[np.float32], scheme: QuantScheme) -> QuantTensor:
        """Codes and scales of a float32 matrix `[rows, columns]`."""


def load_method(name: str) -> Method:
    """The method of a name, which is the name of its file.

    Raises:
        ConfigError: There is no such file.
    """
    if not name.isidentifier() or find_spec(f"{__name__}.{name}") is None:
        raise ConfigError("unknown quantisation method", got=repr(name))
    return cast("Method", importlib.import_module(f"{__name__}.{name}"))
