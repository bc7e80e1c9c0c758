"""The matrices of a model: what a quantisation plan applies to."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lorgnette.export.component import Component
from lorgnette.export.trace import build_module
from lorgnette.targets.capabilities import Matrix


def matrices_of(components: Iterable[Component]) -> list[Matrix]:
    """Weights of linear layers and embedding tables, in the order of the modules; reads none."""
    found = []
    for component in components:
        for name, layer in build_module(component).named_modules():
            if isinstance(layer, nn.Linear | nn.Embedding):
                rows, columns = layer.weight.shape
                found.append(
                    Matrix(
                        component=component.name,
                        name=f"{name}.weight" if name else "weight",
                        rows=rows,
                        columns=columns,
                        gathered=isinstance(layer, nn.Embedding),
                    )
                )
    return found
