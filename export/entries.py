"""Entries of a manifest, from what is known of a component and of what was lowered."""

from __future__ import annotations

from collections.abc import Sequence

from lorgnette.export.component import Component, TensorSpec
from lorgnette.manifest import ComponentEntry, TensorEntry
from lorgnette.targets.target import LoweredComponent


def component_entry(component: Component, lowered: LoweredComponent) -> ComponentEntry:
    """The entry of a component: its contract, and what its target made of it."""
    return ComponentEntry(
        name=component.name,
        entry_points=component.entry_points,
        graph=lowered.graph,
        inputs=_tensors(component.inputs),
        outputs=_tensors(component.outputs),
        cache_inputs=_tensors(component.cache_inputs),
        cache_outputs=_tensors(component.cache_outputs),
        operators=lowered.operators,
        weight_bytes=lowered.weight_bytes,
        kept_in_float=lowered.kept_in_float,
        functions=lowered.functions,
        exceptions=lowered.exceptions,
        fallbacks=lowered.fallbacks,
        advice=lowered.advice,
    )


def _tensors(specs: Sequence[TensorSpec]) -> tuple[TensorEntry, ...]:
    return tuple(
        TensorEntry(name=spec.name, dtype=str(spec.dtype).removeprefix("torch."), shape=spec.shape)  # type: ignore[arg-type]
        for spec in specs
    )
