"""Quantisation methods: one file each, with a function `quantize(weight, scheme, inputs)`."""

from __future__ import annotations

import importlib
import pkgutil
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol, cast

from lorgnette.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lorgnette.quantize.inputs import LayerInputs
    from lorgnette.quantize.scheme import QuantScheme, QuantTensor


class Method(Protocol):
    """What every module of this folder defines."""

    NEEDS_INPUTS: bool
    """Whether it cannot do without what calibration saw; others may still make use of it."""

    def quantize(
        self, weight: NDArray[np.float32], scheme: QuantScheme, inputs: LayerInputs | None = None
    ) -> QuantTensor:
        """Codes and scales of a float32 matrix `[rows, columns]`.

        Args:
            weight: The matrix.
            scheme: What is wanted.
            inputs: What calibration saw of the vectors that it is multiplied with.
        """


def load_method(name: str) -> Method:
    """The method of a name, which is the name of its file.

    Raises:
        ConfigError: There is no such file; lists those that are there.
    """
    if not name.isidentifier() or find_spec(f"{__name__}.{name}") is None:
        known = f"one of {', '.join(method_names())}"
        raise ConfigError("unknown quantisation method", got=repr(name), wanted=known)
    return cast("Method", importlib.import_module(f"{__name__}.{name}"))


def method_names() -> list[str]:
    """Every method by name, without loading any."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))
