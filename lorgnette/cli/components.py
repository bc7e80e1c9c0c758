"""Components of a bundle as lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lorgnette.cli.output import size, table

if TYPE_CHECKING:
    from lorgnette.manifest import ComponentEntry


def component_lines(components: Sequence[ComponentEntry]) -> list[str]:
    """Weights of each component by storage form, and what departs from the plan."""
    rows = [
        (
            entry.name,
            size(sum(entry.weight_bytes.values())),
            forms(entry.weight_bytes),
        )
        for entry in components
    ]
    return [*table(rows), *departures(components)]


def departures(components: Sequence[ComponentEntry]) -> list[str]:
    """What is otherwise than was asked for, or would hinder the accelerator."""
    kept = [
        f"  {entry.name}: '{name}' stayed float: {reason}"
        for entry in components
        for name, reason in entry.kept_in_float.items()
    ]
    said = [f"  {entry.name}: {line}" for entry in components for line in entry.exceptions]
    return [*kept, *said, *_fallbacks(components), *_advice(components)]


def _fallbacks(components: Sequence[ComponentEntry]) -> list[str]:
    """Operators that run outside the delegate: how often, where they were written, and why."""
    found = [(entry.name, each) for entry in components for each in entry.fallbacks]
    if not found:
        return []
    count = sum(each.count for _, each in found)
    rows = [
        (f"{each.count} x", each.operator, name, each.source, each.reason) for name, each in found
    ]
    return [f"Outside the delegate: {count} operators", *table(rows)]


def _advice(components: Sequence[ComponentEntry]) -> list[str]:
    """What would hinder the accelerator, told once for all components."""
    by_line: dict[str, list[str]] = {}
    for entry in components:
        for line in entry.advice:
            by_line.setdefault(line, []).append(entry.name)
    if not by_line:
        return []
    rows = [f"  {line} ({', '.join(names)})" for line, names in by_line.items()]
    return ["For the accelerator (advice, not measured):", *rows]


def forms(weight_bytes: Mapping[str, int]) -> str:
    """Bytes of weights by storage form."""
    return ", ".join(f"{form} {size(count)}" for form, count in weight_bytes.items() if count)
