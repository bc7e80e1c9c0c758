"""Single modules as components, so that one operator or one rule can be tested alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lorgnette.export.checkpoint import Checkpoint, open_files
from lorgnette.export.component import Component, TensorSpec
from lorgnette.export.trace import build_module, trace
from lorgnette.export.weights import WeightSource, module_shapes
from lorgnette.quantize.plan import PLANS, QuantPlan, Rule
from lorgnette.quantize.scheme import Activations, QuantScheme
from lorgnette.targets.onnx.lowering import OnnxCpu
from lorgnette.targets.target import LoweredComponent
from tests.helpers import write_weights
from tests.quantized import quantized_source

Array = NDArray[Any]
Function = Callable[[Tensor], Tensor]
Session = onnxruntime.InferenceSession
WITHOUT_PICTURES = ("fp32", "fp16", "int8", "int4-fast")
"""Named plans whose codes need no calibration; they leave out what it would add."""
WIDTH = 64
"""Channels of modules made by `of_width`, if nothing else is said."""


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
        rules={name: name for name in (re.sub(r"\.\d+\.", ".{i}.", n) for n in names)},
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
    with OnnxCpu().open(out) as lowering:
        rounded = quantized_source(folder, component, source, plan)
        report = lowering.add(component, trace(component), rounded)
    return Lowered(out, report, session(out / report.graph))


def session(graph: Path | bytes, threads: int = 1) -> Session:
    """An engine, by default of one thread, which makes runs repeatable."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class Call(nn.Module):
    """A function of one tensor as a module."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def of_width(
    build: Callable[[], nn.Module], columns: int = WIDTH, *, outputs: int = 1
) -> Component:
    """A component from float32 `[1, T, columns]` to anything."""
    made = tuple(TensorSpec(f"y{i}", torch.float32, ("a", "b", "c")) for i in range(outputs))
    return single(
        build,
        (TensorSpec("x", torch.float32, (1, "T", columns)),),
        made,
        axes={"T": (1, 64)},
    )


def draw(*shape: int) -> Array:
    """Normal numbers, the same each time."""
    return np.random.default_rng(7).standard_normal(shape, dtype=np.float32)


def plan_of(
    bits: int,
    group: int = 32,
    *,
    activations: Activations = "float",
    symmetric: bool = True,
    method: str = "rtn",
) -> QuantPlan:
    """A plan of one integer scheme."""
    scheme = QuantScheme(bits=bits, group_size=group, activations=activations, symmetric=symmetric)
    return QuantPlan("one", "one scheme for all", (Rule("*", scheme, method),))


def check(tmp_path: Path, component: Component, *inputs: Array, tolerance: float = 2e-6) -> Lowered:
    """Lowers in float32 and compares with torch on the same weights; returns the graph."""
    weights = weights_of(component)
    lowered = lower(tmp_path, component, weights, PLANS["fp32"])
    module = build_module(component)
    module.load_state_dict(weights, assign=True)
    with torch.no_grad():
        wanted = module(*map(torch.from_numpy, inputs))
    every = wanted if isinstance(wanted, tuple) else (wanted,)
    got = lowered.run(*inputs)
    for one, other in zip(got, every, strict=True):
        assert one.shape == tuple(other.shape)
        assert np.abs(one - other.numpy()).max() <= tolerance
    return lowered
