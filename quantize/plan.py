"""Named plans: which weight gets which scheme."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from lorgnette.errors import ConfigError
from lorgnette.quantize.methods import load_method
from lorgnette.quantize.scheme import (
    FLOAT16,
    FLOAT32,
    Activations,
    QuantScheme,
    QuantTensor,
)

GROUP = 32


def _grouped(bits: int, activations: Activations) -> QuantScheme:
    return QuantScheme(bits=bits, group_size=GROUP, activations=activations)


VISION_INT8: tuple[tuple[str, QuantScheme], ...] = (
    # Patches of pixels and the one row of a squeeze-excite gate: no time to win.
    ("vision_encoder/tower.embed.*", _grouped(8, "float")),
    ("vision_encoder/*.gate.*", _grouped(8, "float")),
    ("vision_encoder/*", QuantScheme(bits=8, activations="int8_token")),
)
"""Vision towers and projectors on integer kernels."""


@dataclass(frozen=True)
class QuantPlan:
    """Ordered rules: the first whose pattern fits `component/parameter` decides.

    Only matrices that a target multiplies by or gathers from are asked for; norms, biases,
    positions and rotary tables always stay float32: they are small and touch every value.
    """

    name: str
    summary: str
    rules: tuple[tuple[str, QuantScheme], ...]
    method: str = "rtn"
    """The file in `methods/` that computes integer codes."""

    def scheme_for(self, component: str, parameter: str) -> QuantScheme:
        """The scheme of a matrix."""
        key = f"{component}/{parameter}"
        return next(scheme for pattern, scheme in self.rules if fnmatchcase(key, pattern))

    def quantize(self, weight: NDArray[np.float32], scheme: QuantScheme) -> QuantTensor:
        """Codes and scales of a float32 matrix `[rows, columns]`."""
        return load_method(self.method).quantize(weight, scheme)


PLANS: dict[str, QuantPlan] = {
    plan.name: plan
    for plan in (
        QuantPlan("fp32", "every weight float32", (("*", FLOAT32),)),
        QuantPlan("fp16", "every weight float16 on disk, computed in float32", (("*", FLOAT16),)),
        QuantPlan(
            "int8",
            "matrices 8-bit in groups of 32, vision encoder by channel on integer kernels, "
            "round to nearest",
            (
                *VISION_INT8,
                ("*", _grouped(8, "int8_group")),
            ),
        ),
        QuantPlan(
            "int4",
            "decoder, head and embedding 4-bit in groups of 32, vision encoder 8-bit by channel on "
            "integer kernels, round to nearest",
            (
                *VISION_INT8,
                ("*", _grouped(4, "int8_group")),
            ),
        ),
    )
}


def find_plan(name: str) -> QuantPlan:
    """The plan of a name.

    Raises:
        ConfigError: There is none; lists the known ones.
    """
    if name not in PLANS:
        raise ConfigError("unknown scheme", got=repr(name), wanted=f"one of {', '.join(PLANS)}")
    return PLANS[name]
