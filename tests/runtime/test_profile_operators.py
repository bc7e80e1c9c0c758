"""From an engine's own trace to a table by entry point, module and operator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorgnette.bundle import open_bundle
from lorgnette.errors import ProfileError
from lorgnette.runtime.engines import open_profiled_engine
from lorgnette.runtime.engines.engine import OperatorTrace
from lorgnette.runtime.profile import jobs
from lorgnette.runtime.profile.operators import (
    Entry,
    Window,
    collapsed,
    module_of,
    operator_phases,
)
from lorgnette.runtime.profile.request import Job

START = 5_000_000
"""Of a trace, in nanoseconds."""


def event(name: str, operator: str, ts: int, dur: int, cat: str = "Node") -> dict[str, Any]:
    args = {"op_name": operator, "node_index": "3", "activation_size": "12"}
    return {"cat": cat, "name": name, "ts": ts, "dur": dur, "ph": "X", "tid": 1, "args": args}


def trace(folder: Path, events: list[dict[str, Any]], component: str = "decoder") -> OperatorTrace:
    path = folder / f"{component}.json"
    path.write_text(json.dumps(events))
    return OperatorTrace(component, path, START)


def window(start_us: int, end_us: int) -> Window:
    return Window(START + start_us * 1000, START + end_us * 1000)


def kernel(name: str) -> str:
    return f"{name}_kernel_time"


def test_time_is_summed_by_entry_point_node_and_group(tmp_path: Path) -> None:
    events = [
        event("model_run", "", 0, 10_000, "Session"),
        event(kernel("layers.0.mlp.up/MatMulNBits_1"), "MatMulNBits", 100, 300),
        event(kernel("layers.1.mlp.up/MatMulNBits_2"), "MatMulNBits", 400, 100),
        event(kernel("Reorder_token_3"), "ReorderInput", 500, 100),
        event(kernel("layers.0.mlp.up/MatMulNBits_1"), "MatMulNBits", 1_100, 300),
        event(kernel("layers.0.mlp.up/MatMulNBits_1"), "MatMulNBits", 9_100, 7),
        event(kernel("layers.0.mlp.up/MatMulNBits_1"), "MatMulNBits", 20_000, 999),
    ]
    entries = {
        "prefill": Entry("decoder", "2 positions", [window(0, 1_000), window(1_000, 2_000)]),
        "decode": Entry("decoder", "1 token", [window(9_000, 9_500)]),
    }
    other = trace(tmp_path, [event(kernel("x/Conv_1"), "Conv", 200, 50)], "vision_encoder")
    found = operator_phases([other, trace(tmp_path, events)], entries)
    prefill = found["prefill"]
    assert [(g.module, g.operator, g.nodes, g.ms) for g in prefill.groups] == [
        ("layers.*.mlp.up", "MatMulNBits", 2, pytest.approx(0.35)),
        (None, "ReorderInput", 1, pytest.approx(0.05)),
    ]
    assert [(n.node, n.module, n.share) for n in prefill.nodes] == [
        ("layers.0.mlp.up/MatMulNBits_1", "layers.0.mlp.up", pytest.approx(600 / 800)),
        ("layers.1.mlp.up/MatMulNBits_2", "layers.1.mlp.up", pytest.approx(100 / 800)),
        ("Reorder_token_3", None, pytest.approx(100 / 800)),
    ]
    assert [bool(part.reason) for part in prefill.groups] == [False, True]
    assert (prefill.runs, prefill.wall_ms) == (2, pytest.approx(1.0))
    assert found["decode"].operators_ms == pytest.approx(0.007)


def test_nodes_inside_a_loop_count_once(tmp_path: Path) -> None:
    events = [
        event(kernel("Loop_1"), "Loop", 100, 500),
        event(kernel("Add_1"), "Add", 150, 100),
        event(kernel("Add_2"), "Add", 300, 100),
        event(kernel("Mul_1"), "Mul", 600, 50),
    ]
    entries = {"encode": Entry("decoder", "", [window(0, 1_000)])}
    found = operator_phases([trace(tmp_path, events)], entries)["encode"]
    assert [(node.node, node.ms) for node in found.nodes] == [("Loop_1", 0.5), ("Mul_1", 0.05)]


@pytest.mark.parametrize(
    ("node", "module"),
    [
        ("tower.layers.3.mlp.fc1/MatMulIntegerToFloat_12", "tower.layers.3.mlp.fc1"),
        ("fused tower.layers.3.mlp.fc1/Gelu_1", "tower.layers.3.mlp.fc1"),
        ("lm_head/MatMulNBits_9/fused_1", "lm_head"),
        ("MatMul_12", None),
        ("Reorder input/x", None),
        ("/Mul_1", None),
        ("", None),
    ],
)
def test_the_module_is_what_stands_before_the_stroke(node: str, module: str | None) -> None:
    assert module_of(node) == module


def test_numbers_of_layers_are_collapsed_and_no_others() -> None:
    assert collapsed("tower.layers.12.mlp.fc1") == "tower.layers.*.mlp.fc1"
    assert collapsed("blocks.0.1") == "blocks.*.*"
    assert collapsed("conv1.norm2") == "conv1.norm2"


@pytest.mark.parametrize("data", [b"", b"[{]", b'[{"ts": "now"}]', b"\xff"])
def test_a_trace_that_cannot_be_read_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    entries = {"decode": Entry("decoder", "", [window(0, 1)])}
    with pytest.raises(ProfileError, match="cannot be read in decoder"):
        operator_phases([OperatorTrace("decoder", path, 0)], entries)


def test_a_trace_that_tells_nothing_of_an_entry_point_is_refused(tmp_path: Path) -> None:
    events = [event(kernel("Add_1"), "Add", 5_000, 10)]
    entries = {"decode": Entry("decoder", "", [window(0, 1_000)])}
    with pytest.raises(ProfileError, match="tells of no operator in decode"):
        operator_phases([trace(tmp_path, events)], entries)


def test_an_engine_without_a_profiler_is_null_with_the_reason(
    fp32: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Other:
        """An engine as others are."""

    monkeypatch.setattr("lorgnette.runtime.engines.onnx.OnnxEngine", Other)
    job = Job(kind="operators", bundle=str(fp32), threads=1, picture=None, runs=1, seconds=0.0)
    found = jobs.operators_job(job, tmp_path)
    assert found.entry_points is None
    assert found.reason == "the engine 'onnxruntime' has no profiler of operators here"


def test_the_engines_clock_is_the_clock_of_this_process(fp32: Path, tmp_path: Path) -> None:
    import time

    import numpy as np

    engine = open_profiled_engine(open_bundle(fp32), 1, tmp_path)
    assert engine is not None
    before = time.monotonic_ns()
    engine.embed(np.zeros(3, np.int64))
    after = time.monotonic_ns()
    (found,) = [trace for trace in engine.end_profiling() if trace.component == "token_embedding"]
    events = json.loads(found.path.read_text())
    nodes = [each for each in events if each["cat"] == "Node"]
    assert nodes
    for node in nodes:
        start = found.start_ns + node["ts"] * 1000
        # Clocks are read one after the other, and the trace rounds to microseconds.
        assert before - 1_000_000 < start < after + 1_000_000
