"""Named plans: which weight gets which scheme."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

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


Scaling = Literal["none", "awq", "outliers", "smoothquant"]
"""How channels between two matrices are rescaled before they are rounded; see `scaling/`."""


class Promise(NamedTuple):
    """What a plan promises of the answers; an export that measures worse is refused."""

    max_kl: float
    """Mean KL divergence of the next token from the original's, in nats, over answers."""
    min_same_answer: float
    """Share of greedy answers that are the original's token for token."""


class Rule(NamedTuple):
    """How the matrices that a pattern selects are stored, and how their codes are chosen."""

    select: str
    """fnmatch over `component/parameter`: `*` stands for any text, `?` for one character."""
    scheme: QuantScheme
    method: str = "rtn"
    """The file in `methods/` that computes integer codes."""
    scaling: Scaling = "none"
    """The file in `scaling/` that evens out channels first; none leaves them."""

    @property
    def looks_at_inputs(self) -> bool:
        """Whether it cannot be followed without knowing what matrices are multiplied with."""
        return self.scheme.is_integer and (
            load_method(self.method).NEEDS_INPUTS
            or self.scaling != "none"
            or self.scheme.activations == "int8_static"
        )

    def __str__(self) -> str:
        """The rule in a few words."""
        by = self.method if self.scaling == "none" else f"{self.scaling} and {self.method}"
        how = f" by {by}" if self.scheme.is_integer else ""
        return f"{self.select}: {self.scheme.full_name}{how}"


@dataclass(frozen=True)
class QuantPlan:
    """Ordered rules: the first whose pattern fits `component/parameter` decides.

    Only matrices that a target multiplies by or gathers from are asked for; norms, biases,
    positions and rotary tables always stay float32: they are small and touch every value.
    """

    name: str
    summary: str
    rules: tuple[Rule, ...]
    rotate: bool = False
    """Whether the decoder's residual stream is rotated by a Hadamard matrix, which fuses away."""
    cache_bits: Literal[8, 32] = 32
    """Bits of an element of the KV cache."""
    promise: Promise | None = None

    @property
    def needs_samples(self) -> bool:
        """Whether it cannot be followed without pictures."""
        return self.cache_bits == 8 or any(rule.looks_at_inputs for rule in self.rules)

    def find_rule(self, component: str, parameter: str) -> Rule | None:
        """The rule that decides about a weight, None where no pattern fits it."""
        key = f"{component}/{parameter}"
        return next((rule for rule in self.rules if fnmatchcase(key, rule.select)), None)

    def rule_for(self, component: str, parameter: str) -> Rule:
        """The rule that decides about a matrix.

        Raises:
            ConfigError: No pattern fits it.
        """
        rule = self.find_rule(component, parameter)
        if rule is None:
            raise ConfigError(
                f"no rule selects the matrix '{component}/{parameter}'",
                where=f"plan '{self.name}'",
                hint='end with a rule that selects "*"',
            )
        return rule

    def scheme_for(self, component: str, parameter: str) -> QuantScheme:
        """The scheme of a matrix."""
        return self.rule_for(component, parameter).scheme

    def quantize(self, component: str, parameter: str, weight: NDArray[np.float32]) -> QuantTensor:
        """Codes and scales of a float32 matrix `[rows, columns]` by the rule that selects it."""
        rule = self.rule_for(component, parameter)
        return load_method(rule.method).quantize(weight, rule.scheme)


def _grouped(bits: int, activations: Activations = "int8_group") -> QuantScheme:
    return QuantScheme(bits=bits, group_size=GROUP, activations=activations, scale_bits=16)


BY_CHANNEL = QuantScheme(bits=8, activations="int8_token")
NARROW = QuantScheme(bits=8, activations="int8_token", narrow=True)
SMALL_VISION = (
    # Patches of pixels and the one row of a squeeze-excite gate: no time to win.
    Rule("vision_encoder/tower.embed.*", _grouped(8, "float"), "mse"),
    Rule("vision_encoder/*.gate.*", _grouped(8, "float"), "mse"),
)


def _decoder(bits: int, method: str, scaling: Scaling) -> tuple[Rule, ...]:
    """Table and head in one form: where they are one tensor, the table takes the head's codes."""
    scheme = _grouped(bits)
    return (
        Rule("token_embedding/*", scheme, "mse"),
        Rule("decoder/head.weight", scheme, method),
        Rule("*", scheme, method, scaling),
    )


PLANS: dict[str, QuantPlan] = {
    plan.name: plan
    for plan in (
        QuantPlan("fp32", "every weight float32", (Rule("*", FLOAT32),)),
        QuantPlan(
            "fp16", "every weight float16 on disk, computed in float32", (Rule("*", FLOAT16),)
        ),
        QuantPlan(
            "int8",
            "matrices 8-bit in groups of 32, vision encoder by channel on integer kernels, "
            "outliers evened out by calibration",
            (
                *SMALL_VISION,
                Rule("vision_encoder/*", BY_CHANNEL, "mse", "outliers"),
                *_decoder(8, "mse", "outliers"),
            ),
            promise=Promise(0.01, 0.9),
        ),
        QuantPlan(
            "int8-channel",
            "matrices 8-bit by channel with activations rounded by position, the form that "
            "kernels of phones know; outliers evened out by calibration",
            (
                *SMALL_VISION,
                Rule("token_embedding/*", _grouped(8), "mse"),
                Rule("decoder/head.weight", BY_CHANNEL, "mse"),
                Rule("*", BY_CHANNEL, "mse", "outliers"),
            ),
            promise=Promise(0.02, 0.85),
        ),
        QuantPlan(
            "int4",
            "decoder, head and embedding 4-bit in groups of 32, vision encoder 8-bit by channel on "
            "integer kernels, calibrated: outliers evened out, errors made up for (GPTQ)",
            (
                *SMALL_VISION,
                Rule("vision_encoder/*", NARROW, "mse", "outliers"),
                *_decoder(4, "gptq", "outliers"),
            ),
            promise=Promise(0.1, 0.5),
        ),
        QuantPlan(
            "int4-fast",
            "the same forms as int4, made in a fraction of the time: nothing is calibrated",
            (
                *SMALL_VISION,
                Rule("vision_encoder/*", NARROW, "mse"),
                *_decoder(4, "mse", "none"),
            ),
            promise=Promise(0.2, 0.3),
        ),
    )
}


MIXED = "mixed"
"""What asks for a plan that is found by measuring: its rules are a checkpoint's own."""
MIXED_BITS = 3.5
MIXED_PROMISE = Promise(0.2, 0.3)
"""Bits of its codes on average over all matrices, scales not counted."""


def find_plan(name: str) -> QuantPlan:
    """The plan of a name.

    Raises:
        ConfigError: There is none; lists the known ones.
    """
    if name not in PLANS:
        known = ", ".join((*PLANS, MIXED))
        raise ConfigError("unknown scheme", got=repr(name), wanted=f"one of {known}")
    return PLANS[name]
