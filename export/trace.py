"""Component to ExportedProgram, on the meta device: shapes only, no weights in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lorgnette.export.component import Component, TensorSpec


def build_module(component: Component) -> nn.Module:
    """The component's module with parameters on the meta device."""
    with torch.device("meta"):
        return component.build().eval().requires_grad_(False)


def example_inputs(component: Component) -> tuple[Tensor | list[Tensor], ...]:
    """Meta tensors in the shapes of the component; dynamic axes get a size of their own."""
    # Sizes of at least two, all different: torch.export specialises on 0 and 1, and ties equal
    # sizes together.
    sizes = {axis: 3 + 2 * i for i, axis in enumerate(component.dynamic_axes)}

    def make(spec: TensorSpec) -> Tensor:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape]
        return torch.empty(shape, dtype=spec.dtype, device="meta")

    inputs: list[Tensor | list[Tensor]] = [make(spec) for spec in component.inputs]
    if component.cache_inputs:
        inputs.append([make(spec) for spec in component.cache_inputs])
    return tuple(inputs)


def trace(component: Component) -> ExportedProgram:
    """Traces the component once; its program serves all of its entry points."""
    dims = {
        name: Dim(name, min=low, max=high) for name, (low, high) in component.dynamic_axes.items()
    }

    def dynamic(spec: TensorSpec) -> dict[int, Dim]:
        return {i: dims[axis] for i, axis in enumerate(spec.shape) if isinstance(axis, str)}

    shapes: list[object] = [dynamic(spec) for spec in component.inputs]
    if component.cache_inputs:
        shapes.append([dynamic(spec) for spec in component.cache_inputs])
    with torch.no_grad():
        return torch.export.export(
            build_module(component), example_inputs(component), dynamic_shapes=tuple(shapes)
        )
