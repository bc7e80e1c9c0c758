"""What a search decides about: matrices that share a scheme, and the schemes they may have."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorgnette.errors import ConfigError
from lorgnette.export.check import Parts
from lorgnette.export.matrices import matrices_of
from lorgnette.export.weights import WeightSource
from lorgnette.quantize.plan import PLANS, QuantPlan, Rule, Scaling
from lorgnette.quantize.scheme import QuantScheme
from lorgnette.targets.capabilities import Matrix
from lorgnette.targets.target import Target


def _grouped(bits: int, group: int = 32, *, symmetric: bool = True) -> QuantScheme:
    return QuantScheme(
        bits=bits,
        group_size=group,
        symmetric=symmetric,
        activations="int8_group",
        scale_bits=16,
    )


Rung = tuple[QuantScheme, ...]
"""Schemes of which the first that a target carries is tried."""

# Most bits first.
VISION: tuple[Rung, ...] = (
    (QuantScheme(bits=8, activations="int8_token"), _grouped(8)),
    (QuantScheme(bits=4, group_size=32, activations="int8_token", scale_bits=8), _grouped(4)),
    (_grouped(2, 16, symmetric=False), _grouped(2, 16)),
)
DECODER: tuple[Rung, ...] = (
    (_grouped(8),),
    (_grouped(4, 16),),
    (_grouped(4),),
    (_grouped(2, 16, symmetric=False), _grouped(2, 16)),
    (_grouped(2, symmetric=False), _grouped(2)),
)
ENDS: tuple[Rung, ...] = ((_grouped(8),), (_grouped(4),))
FIXED = "int8"
"""The named plan that decides about matrices which it gives float activations: too small or too
rarely multiplied for a choice to matter."""

_LAYER = re.compile(r"((?:.*\.)?layers\.\d+\.[^.]+)\.")


@dataclass(frozen=True)
class Unit:
    """Matrices that share a scheme.

    Attributes:
        name: The common part of their names, component first.
        matrices: All of them.
        rules: What may be done with them, most bits first; selectors are `*`.
        selects: Patterns that select them and no others.
        weights: How many numbers they hold; what two of them share counts once.
    """

    name: str
    matrices: tuple[Matrix, ...]
    rules: tuple[Rule, ...]
    selects: tuple[str, ...]
    weights: int
    shapes: tuple[tuple[int, int], ...]
    """Rows and columns of each matrix; what two of them share counts once."""

    def bytes(self, number: int) -> int:
        """Bytes that they take under a rule, by its number, scales included."""
        return sum(self.rules[number].scheme.stored_bytes(*shape) for shape in self.shapes)

    def code_bits(self, number: int) -> int:
        """Bits of their codes under a rule, by its number."""
        return self.rules[number].scheme.bits * self.weights

    def final_rules(self, number: int) -> list[Rule]:
        """The rules of a plan that say so."""
        return [self.rules[number]._replace(select=select) for select in self.selects]


def find_units(parts: Parts, target: Target) -> list[Unit]:
    """The units of a model, in the order of their first matrices, those that are fixed first.

    A unit is the attention or the feed-forward of one layer; outside of layers, what stands below
    one name. Matrices that were published as one tensor are one unit.

    Raises:
        ConfigError: The target carries no scheme of the ladder for one.
    """
    groups: dict[str, list[Matrix]] = {}
    fixed: dict[str, Rule] = {}
    owners: dict[str, str] = {}
    matrices = matrices_of(parts.components)
    for matrix in matrices:
        rule = PLANS[FIXED].find_rule(matrix.component, matrix.name)
        if rule is not None and rule.scheme.is_integer and rule.scheme.activations == "float":
            name = rule.select
            fixed[name] = rule
        else:
            name = unit_name(matrix, matrices)
            origin = parts.sources[matrix.component].origin(matrix.name)
            name = owners.setdefault(origin or name, name)
        groups.setdefault(name, []).append(matrix)
    units = [_unit(name, groups[name], parts.sources, target, fixed.get(name)) for name in groups]
    return sorted(units, key=lambda unit: unit.name not in fixed)


def unit_name(matrix: Matrix, matrices: Sequence[Matrix]) -> str:
    """The unit that a matrix belongs to: `decoder/layers.0.mlp`, `vision_encoder/projector`."""
    found = _LAYER.match(matrix.name)
    if found:
        return f"{matrix.component}/{found[1]}"
    depth = 1
    siblings = [other.name for other in matrices if other.component == matrix.component]
    path = matrix.name.split(".")
    # What holds layers is no unit, but what stands beside them in it is.
    while any(name.startswith(".".join([*path[:depth], "layers", ""])) for name in siblings):
        depth += 1
    return f"{matrix.component}/{'.'.join(path[:depth])}"


def _unit(
    name: str,
    matrices: Sequence[Matrix],
    sources: Mapping[str, WeightSource],
    target: Target,
    fixed: Rule | None,
) -> Unit:
    rules = _rules(name, matrices, target) if fixed is None else (fixed._replace(select="*"),)
    once = {
        sources[matrix.component].origin(matrix.name) or str(matrix): (matrix.rows, matrix.columns)
        for matrix in matrices
    }
    shapes = tuple(once.values())
    names = [name] if fixed else list(dict.fromkeys(unit_name(m, matrices) for m in matrices))
    return Unit(
        name=name,
        matrices=tuple(matrices),
        rules=rules,
        selects=(name,) if fixed is not None else tuple(f"{each}.*" for each in names),
        weights=sum(rows * columns for rows, columns in shapes),
        shapes=shapes,
    )


def _rules(name: str, matrices: Sequence[Matrix], target: Target) -> tuple[Rule, ...]:
    """What is tried for the matrices of a unit, of what the target carries."""
    vision = any(matrix.component == "vision_encoder" for matrix in matrices)
    layers = all(_LAYER.match(matrix.name) for matrix in matrices)
    ladder = VISION if vision else DECODER if layers else ENDS
    # The table and the head, where they are one tensor, stay so by a method without data.
    method: str = "gptq" if vision or layers else "mse"
    scaling: Scaling = "smoothquant" if vision or layers else "none"
    rules = []
    for rung in ladder:
        for scheme in rung:
            rule = Rule("*", scheme, method, scaling)
            if not target.check(matrices, QuantPlan("", "", (rule,))):
                rules.append(rule)
                break
    if not rules:
        raise ConfigError(
            f"the target '{target.name}' carries none of the schemes that are tried",
            where=f"'{name}'",
            got=", ".join(scheme.full_name for rung in ladder for scheme in rung),
        )
    return tuple(rules)


def plan_of(units: Sequence[Unit], chosen: Sequence[int], name: str, summary: str) -> QuantPlan:
    """The plan of some choices; the last rule of a unit stands in for those that it lacks."""
    rules = [
        rule
        for unit, number in zip(units, chosen, strict=True)
        for rule in unit.final_rules(min(number, len(unit.rules) - 1))
    ]
    return QuantPlan(name, summary, tuple(rules))
