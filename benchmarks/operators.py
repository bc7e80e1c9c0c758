"""Operators of onnxruntime beside others that give the same: the choices of the target onnx-cpu.

    python -m benchmarks.operators [--runs 9] [--threads 1]

Norms: a residual addition and its normalisation, fused and apart, in the shape of SmolVLM-256M's
vision tower. Positions: the matrices of one decoder layer of SmolVLM-256M, as few positions
multiply them (codes of 4 bits in groups) and as the prefill graph does (codes by row, made anew in
each call), for numbers of positions on both sides of where that pays. Times are milliseconds of
processor time, of all threads together, since that depends least on what else a machine does;
candidates run in turns and medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from lorgnette.export.component import TensorSpec
from lorgnette.export.trace import build_module, trace
from lorgnette.export.weights import WeightSource, module_shapes
from lorgnette.quantize.plan import QuantPlan, Rule
from lorgnette.quantize.scheme import QuantScheme
from lorgnette.targets.onnx.graph import GraphBuilder
from lorgnette.targets.onnx.lowering import OnnxLowering
from lorgnette.targets.onnx.weight_file import WeightFile
from tests.quantized import quantized_source
from tests.small import session, single, tensor_folder, weights_of

PATCHES, WIDTH = 1024, 768
SHAPES = ((576, 960), (576, 576), (576, 3072), (1536, 576))
"""Columns and rows of a decoder layer's matrices."""
POSITIONS = (64, 128, 192, 256, 512, 1024)
SCHEME = QuantScheme(bits=4, group_size=32, activations="int8_group", scale_bits=16)

Feeds = Mapping[str, NDArray[np.generic]]
Run = Callable[[], object]


def norms(threads: int) -> dict[str, Run]:
    """A residual and its norm: one operator, or two."""
    gamma, beta = (numpy_helper.from_array(np.ones(WIDTH, np.float32), name) for name in "gb")
    epsilon = {"epsilon": 1e-6}
    add = helper.make_node("Add", ["x", "r"], ["s"])
    contrib = {"domain": "com.microsoft", **epsilon}
    outputs = ["y", "", "", "s"]
    skip = helper.make_node("SkipLayerNormalization", ["x", "r", "g", "b"], outputs, **contrib)
    short = helper.make_node(
        "SkipSimplifiedLayerNormalization", ["x", "r", "g"], outputs, **contrib
    )
    candidates = {
        "LayerNormalization, fused": [skip],
        "LayerNormalization, apart": [
            add,
            helper.make_node("LayerNormalization", ["s", "g", "b"], ["y"], **epsilon),
        ],
        "SimplifiedLayerNormalization, fused": [short],
        "SimplifiedLayerNormalization, apart": [
            add,
            helper.make_node("SimplifiedLayerNormalization", ["s", "g"], ["y"], **epsilon),
        ],
    }
    x = np.random.default_rng(0).standard_normal((1, PATCHES, WIDTH), dtype=np.float32)
    kind = TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info(name, kind, x.shape) for name in "xr"]
    made = [helper.make_tensor_value_info(name, kind, None) for name in "ys"]
    runs: dict[str, Run] = {}
    for name, nodes in candidates.items():
        used = {value for node in nodes for value in node.input}
        stored = [value for value in (gamma, beta) if value.name in used]
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        graph = helper.make_graph(nodes, "norm", inputs, made, stored)
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        opened = session(model.SerializeToString(), threads)
        runs[name] = lambda opened=opened: opened.run(None, {"x": x, "r": x})  # type: ignore[misc]
    return runs


def layer(folder: Path, threads: int) -> dict[str, Callable[[int], Run]]:
    """A decoder layer's matrices, as few and as many positions multiply them."""
    made: dict[str, list[tuple[Callable[[Feeds], object], int]]] = {"few": [], "many": []}
    for columns, rows in SHAPES:
        component = single(
            lambda columns=columns, rows=rows: nn.Linear(columns, rows, bias=False),  # type: ignore[misc]
            (TensorSpec("x", torch.float32, (1, "T", columns)),),
            (TensorSpec("y", torch.float32, (1, "T", rows)),),
            axes={"T": (1, 2048)},
        )
        place = folder / f"{columns}x{rows}"
        checkpoint = tensor_folder(place / "checkpoint", weights_of(component))
        shapes = module_shapes(build_module(component))
        source = WeightSource(checkpoint, shapes, component.rules)
        rounded = quantized_source(
            place, component, source, QuantPlan("", "", (Rule("*", SCHEME),))
        )
        (place / "graphs").mkdir()
        with WeightFile(place / "graphs" / "weights.bin") as file:
            for name in made:
                builder = GraphBuilder(component, rounded, file, many_positions=name == "many")
                graph, _ = OnnxLowering(place, file).write(builder, trace(component), name)
                made[name].append((_runner(place / graph, threads), columns))

    def run_all(name: str, count: int) -> Run:
        feeds = [np.ones((1, count, columns), np.float32) for _, columns in made[name]]
        return lambda: [run({"x": x}) for (run, _), x in zip(made[name], feeds, strict=True)]

    return {name: lambda count, name=name: run_all(name, count) for name in made}  # type: ignore[misc]


def _runner(graph: Path, threads: int) -> Callable[[Feeds], object]:
    opened = session(graph, threads)
    return lambda feeds: opened.run(None, feeds)


def medians(runs: Mapping[str, Run], count: int) -> dict[str, float]:
    """Median processor time in milliseconds of each, run in turns."""
    for run in runs.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(count):
        for name, run in runs.items():
            started = time.process_time()
            run()
            taken[name].append((time.process_time() - started) * 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and prints both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    print(f"{given.threads} threads\n\nnorms of {PATCHES} x {WIDTH}, ms")
    for name, took in medians(norms(given.threads), given.runs).items():
        print(f"  {name:38}{took:8.2f}")
    print(f"\none decoder layer, ms\n  {'positions':12}{'few':>8}{'many':>8}{'few / many':>12}")
    with TemporaryDirectory() as folder:
        candidates = layer(Path(folder), given.threads)
        for count in POSITIONS:
            took_each = medians({n: make(count) for n, make in candidates.items()}, given.runs)
            few, many = took_each["few"], took_each["many"]
            print(f"  {count:<12}{few:8.2f}{many:8.2f}{few / many:12.2f}")


if __name__ == "__main__":
    main()
