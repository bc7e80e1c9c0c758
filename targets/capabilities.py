"""What a target can carry, as data: schemes of matrices, and what runs them."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Literal

from msgspec import field, structs

from lorgnette.quantize.plan import QuantPlan
from lorgnette.quantize.scheme import Activations, QuantScheme, ScaleBits
from lorgnette.spec import Frozen

DECODER_MATRIX = ("decoder", "layers.0.mlp.down_proj.weight")
"""A matrix that every decoder has, and that stands for the most of its bytes."""
NEAREST = 3
"""How many schemes are named in place of one that cannot be carried."""


class Matrix(Frozen, frozen=True):
    """A weight that a plan applies to."""

    component: str
    name: str
    rows: int
    columns: int
    gathered: bool
    """Whether rows are looked up in it (an embedding table) or inputs multiplied by it."""

    def __str__(self) -> str:
        """Its name as selectors see it."""
        return f"{self.component}/{self.name}"


class SchemeRange(Frozen, frozen=True):
    """Schemes that differ in a few numbers: every combination of these."""

    bits: tuple[int, ...]
    groups: tuple[int, ...] = (0,)
    """Columns of a group; 0 is a whole row."""
    symmetric: tuple[bool, ...] = (True,)
    activations: tuple[Activations, ...] = ("float",)
    per_tensor: tuple[bool, ...] = (False,)
    """Whether one scale for the whole matrix is meant where a group is a whole row."""
    palette: bool = False
    scale_bits: tuple[ScaleBits, ...] = (32,)

    def schemes(self) -> Iterator[QuantScheme]:
        """Every one of them."""
        for bits, group, symmetric, activations, per_tensor, scale_bits in product(
            self.bits,
            self.groups,
            self.symmetric,
            self.activations,
            self.per_tensor,
            self.scale_bits,
        ):
            yield QuantScheme(
                bits=bits,
                group_size=group,
                symmetric=symmetric,
                activations=activations,
                per_tensor=per_tensor,
                palette=self.palette,
                scale_bits=scale_bits,
            )

    def __str__(self) -> str:
        """A line such as `int4/8 g16/32, symmetric or not, activations float or int8_group`."""
        kind = "float" if min(self.bits) >= 16 else "int"
        parts = [kind + "/".join(map(str, self.bits))]
        if kind == "float":
            return parts[0]
        groups = "/".join(str(group) if group else "channel" for group in self.groups)
        zeros = " or ".join("symmetric" if way else "with zero points" for way in self.symmetric)
        return f"{parts[0]} groups {groups}, {zeros}, activations {' or '.join(self.activations)}"


class Capabilities(Frozen, frozen=True):
    """What a target can carry and what runs it."""

    matrices: tuple[SchemeRange, ...]
    """Schemes of matrices that inputs are multiplied by."""
    tables: tuple[SchemeRange, ...]
    """Schemes of tables that rows are gathered from; nothing is multiplied, so what a scheme says
    about activations does not matter there."""
    cache_style: Literal["functional", "state"]
    cache_bits: tuple[int, ...]
    """Bits of an element of the KV cache."""
    engine: str
    """The engine that executes its graphs."""
    engine_package: str
    """The package that brings the engine."""
    packages: tuple[str, ...]
    """The packages whose versions decide what a bundle holds."""
    engine_min_version: str
    extra: str
    """The extra of lorgnette that installs what lowering needs."""
    os_floor: str
    """The oldest systems that run what is made."""
    summary: str
    activations: Mapping[Activations, Activations] = field(default_factory=dict)
    """What it does in place of how a plan rounds activations; codes of weights stay the same."""
    arithmetic: Literal["float32", "float16"] = "float32"
    """What graphs compute in under every plan but fp32, which is float32 always."""
    tile_counts: tuple[int, ...] = ()
    """Tiles that one call of the vision encoder takes; empty for any number."""
    as_floats: tuple[SchemeRange, ...] = ()
    """Schemes of matrices that are carried as float32 of the numbers that codes stand for: right
    for a few small ones, and no plan is taken that would store a decoder so."""
    not_run: str = ""
    """Why what is made cannot be run here or anywhere like here; empty where it can."""

    def adapt(self, scheme: QuantScheme) -> QuantScheme:
        """A scheme with activations as they are treated here; narrow codes are codes like any."""
        activations = self.activations.get(scheme.activations, scheme.activations)
        return structs.replace(scheme, activations=activations, narrow=False)

    def adapt_plan(self, plan: QuantPlan) -> QuantPlan:
        """A plan with activations as they are treated here: what an engine may round."""
        rules = tuple(rule._replace(scheme=self.adapt(rule.scheme)) for rule in plan.rules)
        return replace(plan, rules=rules)

    def carries(self, scheme: QuantScheme, *, gathered: bool) -> bool:
        """Whether a matrix, or a table, can be stored so."""
        found = _plain(self.adapt(scheme), gathered)
        return found in self._schemes(gathered) or (not gathered and self.floats(scheme))

    def floats(self, scheme: QuantScheme) -> bool:
        """Whether a matrix of integers is stored as floats."""
        adapted = self.adapt(scheme)
        return any(adapted in each.schemes() for each in self.as_floats)

    def nearest(self, scheme: QuantScheme, *, gathered: bool) -> list[QuantScheme]:
        """The schemes most like one that cannot be carried, the likest first."""
        found = sorted(
            self._schemes(gathered),
            key=lambda other: _distance(_plain(self.adapt(scheme), gathered), other),
        )
        return found[:NEAREST]

    def takes(self, plan: QuantPlan) -> bool:
        """Whether some matrix can be carried by each rule of a plan."""
        matrices = all(self.carries(rule.scheme, gathered=False) for rule in plan.rules)
        stays = not self.floats(plan.scheme_for(*DECODER_MATRIX))
        return matrices and stays and plan.cache_bits in self.cache_bits

    def _schemes(self, gathered: bool) -> list[QuantScheme]:
        ranges = self.tables if gathered else self.matrices
        return [scheme for each in ranges for scheme in each.schemes()]


def scheme_problems(
    capabilities: Capabilities, plan: QuantPlan, matrices: Iterable[Matrix]
) -> list[str]:
    """Schemes that cannot be carried: for each the matrices, and what is nearest."""
    refused: dict[tuple[QuantScheme, bool], list[Matrix]] = {}
    for matrix in matrices:
        scheme = plan.scheme_for(matrix.component, matrix.name)
        if not capabilities.carries(scheme, gathered=matrix.gathered):
            refused.setdefault((scheme, matrix.gathered), []).append(matrix)
    problems = []
    if plan.cache_bits not in capabilities.cache_bits:
        able = " or ".join(map(str, capabilities.cache_bits))
        problems.append(f"a KV cache cannot be of {plan.cache_bits} bits; nearest: {able}")
    for (scheme, gathered), found in refused.items():
        kind = "gathered" if gathered else "multiplied"
        nearest = capabilities.nearest(scheme, gathered=gathered)
        names = ", ".join(other.full_name for other in nearest)
        problems.append(f"{some(found)} cannot be {kind} as {scheme.full_name}; nearest: {names}")
    return problems


def lacking(extra: str, *modules: str) -> str:
    """Which modules are not installed, and what installs them; empty where all are."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"no {', '.join(missing)}: pip install 'lorgnette[{extra}]'" if missing else ""


def some(matrices: Sequence[Matrix]) -> str:
    """The first of several matrices by name, and how many there are besides."""
    more = f" and {len(matrices) - 1} more" if len(matrices) > 1 else ""
    return f"'{matrices[0]}'{more}"


def _plain(scheme: QuantScheme, gathered: bool) -> QuantScheme:
    if not gathered:
        return scheme
    return structs.replace(scheme, activations="float")


def _distance(one: QuantScheme, other: QuantScheme) -> float:
    """How unlike two schemes are: bits weigh most, then how activations are rounded."""

    def group(scheme: QuantScheme) -> float:
        return math.log2(scheme.group_size or 4096)

    activations = {one.activations, other.activations}
    rounding = 0 if len(activations) == 1 else 6 if "float" in activations else 3
    return (
        8 * abs(math.log2(one.bits / other.bits))
        + 4 * (one.palette != other.palette)
        + rounding
        + 2 * (one.symmetric != other.symmetric)
        + abs(group(one) - group(other))
        + (one.per_tensor != other.per_tensor)
        + 1.5 * (one.scale_bits != other.scale_bits)
    )
