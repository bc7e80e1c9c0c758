"""Every figure of a document by its name, for comparing and for looking at spreads."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from lorgnette.runtime.profile.document import Figure, Memory, Part, Profile

MEASURED = ("start", "answers", "phases", "sweep")
"""Parts of the document that consist of figures."""


def figures_of(profile: Profile) -> dict[str, Figure]:
    """Timings and speeds by dotted name, e.g. `phases.prefill.256.tokens_per_s`."""
    found: dict[str, Figure] = {}
    for name in MEASURED:
        found |= figures_in(name, getattr(profile, name))
    return found


def figures_in(name: str, part: object) -> dict[str, Figure]:
    """Figures of one part of a document, by names that begin with its own."""
    return dict(_walk(name, part))


def bytes_of(profile: Profile) -> dict[str, Figure]:
    """Sizes by dotted name: of the bundle, and of memory phase by phase."""
    found = {"bundle.bytes": _once(profile.bundle.bytes, "")}
    for phase, memory in profile.memory.items():
        for field in ("peak_bytes", "steady_bytes", "steady_private_bytes"):
            value = getattr(memory, field)
            found[f"memory.{phase}.{field}"] = _once(value, memory.reasons.get(field, ""))
    return found


def peak_memory(memory: dict[str, Memory]) -> int | None:
    """The largest peak of all phases; None where none was measured."""
    peaks = [phase.peak_bytes for phase in memory.values()]
    known = [peak for peak in peaks if peak is not None]
    return max(known) if known else None


def _once(value: int | None, reason: str) -> Figure:
    number = None if value is None else float(value)
    return Figure(
        median=number,
        p10=number,
        p90=number,
        min=number,
        runs=0 if value is None else 1,
        reason=reason,
    )


def _walk(name: str, value: object) -> Iterator[tuple[str, Figure]]:
    if isinstance(value, Figure):
        yield name, value
    elif isinstance(value, Part):
        for field in msgspec.structs.fields(value):
            yield from _walk(f"{name}.{field.name}", getattr(value, field.name))
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _walk(f"{name}.{key}", part)
