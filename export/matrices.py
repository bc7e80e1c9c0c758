"""The matrices of a model: what a quantisation plan applies to."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from lorgnette.export.component import Component
from lorgnette.export.trace import build_module
from lorgnette.targets.capabilities import Matrix


def matrices_of(components: Collection[Component]) -> list[Matrix]:
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


def matrix_names(components: Collection[Component]) -> dict[str, set[str]]:
    """The parameters that a plan applies to, by component."""
    names: dict[str, set[str]] = {component.name: set() for component in components}
    for matrix in matrices_of(components):
        names[matrix.component].add(matrix.name)
    return names
