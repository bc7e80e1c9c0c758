"""Operators of onnxruntime beside others that give the same: the choices of the target onnx-cpu.

    python -m benchmarks.operators [--runs 9] [--threads 1] [--bundle B.lorg]

Norms: a residual addition and its normalisation, fused and apart, in the shape of SmolVLM-256M's
vision tower; milliseconds of processor time, of all threads together, since that depends least on
what else a machine does. Candidates run in turns and medians are printed.

Prompts, of a bundle with a prefill graph: the decoder's two graphs, for numbers of positions on
both sides of where the second pays; milliseconds elapsed, since threads share its work less evenly.
They take turns of a few calls, with a rest between, so that neither meets threads of the other that
spin.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from lorgnette.runtime.engines.onnx import OnnxEngine
from lorgnette.runtime.model import open_model
from tests.small import session

PATCHES, WIDTH = 1024, 768
POSITIONS = (64, 128, 192, 256, 320, 384, 512, 1024)
IN_A_ROW = 3
SETTLE = 0.3
"""Seconds until threads of the graph that ran before rest."""

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


def positions(engine: OnnxEngine, rounds: int) -> Iterator[tuple[int, float, float]]:
    """Seconds that the decoder's two graphs take for numbers of positions: these, few, many."""
    states = {"few": engine._state(math.inf), "many": engine._state(1)}
    for count in POSITIONS:
        embeddings = engine.embed(np.arange(count)).copy()
        taken: dict[str, list[float]] = {name: [] for name in states}
        for _ in range(rounds):
            for name, state in states.items():
                time.sleep(SETTLE)
                state.run(embeddings, 0)
                for _ in range(IN_A_ROW):
                    started = time.perf_counter()
                    state.run(embeddings, 0)
                    taken[name].append(time.perf_counter() - started)
        few, of_many = (statistics.median(times) for times in taken.values())
        yield count, few, of_many


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
    parser.add_argument("--bundle", type=Path)
    given = parser.parse_args(arguments)
    print(f"{given.threads} threads\n\nnorms of {PATCHES} x {WIDTH}, ms")
    for name, took in medians(norms(given.threads), given.runs).items():
        print(f"  {name:38}{took:8.2f}")
    if given.bundle is None:
        return
    engine = open_model(given.bundle, threads=given.threads).engine
    if not isinstance(engine, OnnxEngine) or engine.new_prefill_state() is None:
        raise SystemExit(f"{given.bundle} has no prefill graph")
    started = time.perf_counter()
    engine._make_weights().result()
    made = (time.perf_counter() - started) * 1e3
    print(f"\nweights for many positions, made once: {made:.0f} ms")
    print(f"\nprompts, ms elapsed\n  {'positions':12}{'few':>8}{'many':>8}{'few / many':>12}")
    for count, few, many in positions(engine, given.runs):
        print(f"  {count:<12}{few * 1e3:8.0f}{many * 1e3:8.0f}{few / many:12.2f}", flush=True)


if __name__ == "__main__":
    main()
