"""From a component's module to a method of a `.pte`: traced, partitioned, written."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.export import Dim

from lorgnette.export.component import Component
from lorgnette.runtime.engines.executorch import quiet

if TYPE_CHECKING:
    from executorch.exir import EdgeCompileConfig
    from executorch.exir.backend.partitioner import Partitioner
    from torch.export import ExportedProgram

METHODS = {
    "vision_encoder": "vision_encoder",
    "token_embedding": "token_embedding",
    "decoder": "text_decoder",
}
"""What the stock runner calls our components."""
OPERATORS = (
    "executorch.exir.passes._quant_patterns_and_replacements",
    "executorch.extension.llm.custom_ops.custom_ops",
    "torchao.quantization.quant_primitives",
)
"""Modules that register operators as they are imported."""
METHOD = "method"
"""What a method is called before it gets its name in the file."""
EXAMPLE_LENGTH = 5
"""Positions of the traced example: torch.export takes 0 and 1 as constants."""


@dataclass(frozen=True)
class LoweredMethod:
    """A method in the Edge dialect with its delegates inside.

    Attributes:
        program: The method.
        payloads: What each delegate holds, in the order that they are called.
    """

    program: ExportedProgram
    payloads: list[bytes]


def register_operators() -> None:
    """Loads the operators of the KV cache and of coded tables, and what talks while it loads."""
    with quiet():
        for name in OPERATORS:
            importlib.import_module(name)


def trace_method(component: Component, module: nn.Module, context_length: int) -> ExportedProgram:
    """Traces a component's module with the inputs that the stock runner feeds."""
    shape = [
        axis if isinstance(axis, int) else EXAMPLE_LENGTH for axis in component.inputs[0].shape
    ]
    length = Dim("T", min=1, max=context_length)
    inputs: tuple[Tensor, ...]
    shapes: tuple[object, ...]
    if component.name == "vision_encoder":
        inputs, shapes = (torch.zeros([1, *shape[1:]], dtype=torch.uint8),), (None,)
    else:
        inputs, shapes = (torch.zeros(shape, dtype=component.inputs[0].dtype),), ({1: length},)
    if component.name == "decoder":
        inputs, shapes = (*inputs, torch.zeros(1, dtype=torch.int64)), (*shapes, None)
    with torch.no_grad():
        return torch.export.export(module, inputs, dynamic_shapes=shapes)


def lower_method(program: ExportedProgram, partitioner: Partitioner) -> LoweredMethod:
    """Takes a traced method to the Edge dialect and hands what a partitioner takes to delegates.

    Not by `to_edge_transform_and_lower`: that walks the whole program with fake tensors twice more,
    to keep operators whole of which a component here has only linear layers.
    """
    from executorch.exir import to_edge

    edge = to_edge({METHOD: program}, compile_config=compile_config())
    lowered = edge.to_backend({METHOD: partitioner}).exported_program(METHOD)
    payloads = [
        getattr(lowered.graph_module, node.args[0].target).processed_bytes
        for node in lowered.graph.nodes
        if str(node.target) == "executorch_call_delegate"
    ]
    return LoweredMethod(lowered, payloads)


def compile_config() -> EdgeCompileConfig:
    """Checks of the dialect are left out: custom operators and kept linear layers fail them."""
    from executorch.exir import EdgeCompileConfig

    kept = [torch.ops.aten.linear.default, torch.ops.aten.hardswish.default]
    return EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True, preserve_ops=kept)


def write_program(
    path: Path, methods: Mapping[str, ExportedProgram], constants: Mapping[str, object]
) -> None:
    """Writes methods and constant methods to one file."""
    from executorch.exir import EdgeProgramManager, ExecutorchBackendConfig

    manager = EdgeProgramManager(dict(methods), dict(constants), compile_config())
    # Not with memory of its own for the KV cache: every method of a file would then claim it.
    program = manager.to_executorch(ExecutorchBackendConfig(emit_mutable_buffer_names=True))
    with path.open("wb") as file:
        program.write_to_file(file)


def has_convolution(module: nn.Module) -> bool:
    """Whether anything in it needs XNNPACK's passes about the order of axes."""
    return any(isinstance(layer, nn.Conv2d) for layer in module.modules())


def xnnpack_partitioner(*, lean: bool) -> Partitioner:
    """XNNPACK's partitioner.

    Args:
        lean: Without the passes that each delegate's graph goes through, seventeen walks with fake
            tensors which change nothing where there is no convolution; they are more than half of
            the time that lowering takes. The library itself has this switch, for graphs like ours.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir.backend.compile_spec_schema import CompileSpec
    from executorch.exir.backend.partitioner import DelegationSpec

    partitioner = XnnpackPartitioner()
    if lean:
        spec = CompileSpec("dqlinear_partitioner", b"")
        partitioner.delegation_spec = DelegationSpec("XnnpackBackend", [spec])
    return partitioner
