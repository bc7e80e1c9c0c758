"""Single modules as components, so that one operator or one rule can be tested alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lorgnette.export.checkpoint import Checkpoint, open_files
from lorgnette.export.component import Component, TensorSpec
from lorgnette.export.trace import build_module, trace
from lorgnette.export.weights import WeightSource, module_shapes
from lorgnette.quantize.plan import QuantPlan
from lorgnette.targets.onnx.lowering import OnnxCpu
from lorgnette.targets.target import LoweredComponent
from tests.helpers import write_weights

Array = NDArray[Any]


def tensor_folder(folder: Path, tensors: Mapping[str, Tensor]) -> Checkpoint:
    """A checkpoint that holds these tensors and an empty config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    write_weights(folder, tensors)
    return open_files(folder)


def single(
    build: Callable[[], nn.Module],
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    *,
    name: str = "decoder",
    axes: Mapping[str, tuple[int, int]] | None = None,
) -> Component:
    """A component of one module whose parameters are published under their own names."""
    with torch.device("meta"):
        names = module_shapes(build())
    return Component(
        name=name,
        entry_points=("run",),
        build=build,
        rules={parameter: parameter for parameter in names},
        inputs=inputs,
        outputs=outputs,
        dynamic_axes=axes or {},
    )


def weights_of(component: Component, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of order one for a component made by `single`."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
        for name, shape in module_shapes(build_module(component)).items()
    }


@dataclass(frozen=True)
class Lowered:
    """One component as a graph, and what runs it."""

    folder: Path
    report: LoweredComponent
    session: onnxruntime.InferenceSession

    def run(self, *inputs: Array) -> list[Array]:
        """All outputs."""
        names = [i.name for i in self.session.get_inputs()]
        found: list[Array] = self.session.run(None, dict(zip(names, inputs, strict=True)))
        return found


def lower(
    folder: Path, component: Component, weights: Mapping[str, Tensor], plan: QuantPlan
) -> Lowered:
    """Lowers one component and loads it."""
    checkpoint = tensor_folder(folder / "checkpoint", weights)
    source = WeightSource(checkpoint, module_shapes(build_module(component)), component.rules)
    out = folder / "bundle"
    out.mkdir()
    with OnnxCpu().open(out, plan) as lowering:
        report = lowering.add(component, trace(component), source)
    return Lowered(out, report, session(out / report.graph))


def session(graph: Path) -> onnxruntime.InferenceSession:
    """An engine of one thread, which makes runs repeatable."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
