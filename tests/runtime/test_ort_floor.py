"""The oldest onnxruntime supported runs what graphs are made of, and gives numpy's numbers."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lorgnette.targets import all_targets

ROOT = Path(__file__).resolve().parents[2]

RUN = """
import sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
outputs = session.run(None, dict(numpy.load(sys.argv[2])))
names = [output.name for output in session.get_outputs()]
numpy.savez(sys.argv[3], **dict(zip(names, outputs, strict=True)))
print(onnxruntime.__version__)
"""

D, H, HKV, DH, S, BLOCK = 64, 4, 2, 16, 8, 32
PAST, T = 3, 2

Arrays = dict[str, NDArray[np.generic]]


def floor_version() -> str:
    """The lower bound that pyproject.toml promises."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        dependencies = tomllib.load(file)["project"]["dependencies"]
    (found,) = (line for line in dependencies if line.startswith("onnxruntime"))
    return str(found.removeprefix("onnxruntime>="))


def matmul_weights(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes 0..15 `[H * Dh, D]` and scales `[H * Dh, D / block]`."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (H * DH, D), dtype=np.uint8)
    return codes, rng.uniform(-0.02, 0.02, (H * DH, D // BLOCK)).astype(np.float32)


def tiny_model(codes: NDArray[np.uint8], scales: NDArray[np.float32]) -> onnx.ModelProto:
    """A query projection of 4-bit codes, then attention over a cache of capacity S."""
    packed = (codes[:, 0::2] | (codes[:, 1::2] << 4)).reshape(H * DH, D // BLOCK, BLOCK // 2)
    nodes = [
        helper.make_node(
            "MatMulNBits",
            ["x", "codes", "scales"],
            ["query"],
            domain="com.microsoft",
            K=D,
            N=H * DH,
            bits=4,
            block_size=BLOCK,
        ),
        helper.make_node(
            "GroupQueryAttention",
            ["query", "key", "value", "past_key", "past_value", "last", "total"],
            ["attended", "present_key", "present_value"],
            domain="com.microsoft",
            num_heads=H,
            kv_num_heads=HKV,
        ),
    ]
    real = TensorProto.FLOAT
    cache = [1, HKV, S, DH]
    graph = helper.make_graph(
        nodes,
        "floor",
        [
            helper.make_tensor_value_info("x", real, [1, T, D]),
            helper.make_tensor_value_info("key", real, [1, T, HKV * DH]),
            helper.make_tensor_value_info("value", real, [1, T, HKV * DH]),
            helper.make_tensor_value_info("past_key", real, cache),
            helper.make_tensor_value_info("past_value", real, cache),
            helper.make_tensor_value_info("last", TensorProto.INT32, [1]),
            helper.make_tensor_value_info("total", TensorProto.INT32, [1]),
        ],
        [
            helper.make_tensor_value_info("attended", real, [1, T, H * DH]),
            helper.make_tensor_value_info("present_key", real, cache),
            helper.make_tensor_value_info("present_value", real, cache),
        ],
        [
            numpy_helper.from_array(packed, "codes"),
            numpy_helper.from_array(scales.reshape(-1), "scales"),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def expected(
    feeds: Arrays, codes: NDArray[np.uint8], scales: NDArray[np.float32]
) -> NDArray[np.float64]:
    """The same in float64, head by head and position by position."""
    weight = (codes.astype(np.float64) - 8) * np.repeat(scales.astype(np.float64), BLOCK, axis=1)
    query = (feeds["x"][0].astype(np.float64) @ weight.T).reshape(T, H, DH)
    kept = {
        name: np.concatenate(
            [
                feeds[f"past_{name}"][0, :, :PAST],
                feeds[name][0].reshape(T, HKV, DH).swapaxes(0, 1),
            ],
            axis=1,
        ).astype(np.float64)
        for name in ("key", "value")
    }
    out = np.empty((T, H, DH))
    for t in range(T):
        seen = PAST + t + 1
        for head in range(H):
            group = head // (H // HKV)
            scores = kept["key"][group, :seen] @ query[t, head] / np.sqrt(DH)
            shares = np.exp(scores - scores.max())
            out[t, head] = (shares / shares.sum()) @ kept["value"][group, :seen]
    return out.reshape(1, T, H * DH)


@pytest.fixture
def feeds() -> Arrays:
    rng = np.random.default_rng(7)
    shapes = {
        "x": (1, T, D),
        "key": (1, T, HKV * DH),
        "value": (1, T, HKV * DH),
        "past_key": (1, HKV, S, DH),
        "past_value": (1, HKV, S, DH),
    }
    drawn: Arrays = {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    last, total = np.array([PAST + T - 1], np.int32), np.array([PAST + T], np.int32)
    return {**drawn, "last": last, "total": total}


def test_the_promised_floor_is_what_targets_are_made_for() -> None:
    floors = {
        target.capabilities.engine_min_version
        for target in all_targets().values()
        if target.capabilities.engine == "onnxruntime"
    }
    assert floors == {floor_version()}


def test_the_floor_runs_quantised_matrices_and_cached_attention(
    ort_floor_env: dict[str, str], feeds: Arrays, tmp_path: Path
) -> None:
    codes, scales = matmul_weights(seed=1)
    onnx.save(tiny_model(codes, scales), tmp_path / "floor.onnx")
    # numpy's stub takes a switch by keyword, and so refuses any mapping of arrays.
    np.savez(tmp_path / "in.npz", **feeds)  # type: ignore[arg-type]
    files = [str(tmp_path / name) for name in ("floor.onnx", "in.npz", "out.npz")]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *files],
        env=ort_floor_env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [floor_version()]
    with np.load(files[2]) as out:
        np.testing.assert_allclose(
            out["attended"], expected(feeds, codes, scales), rtol=1e-4, atol=1e-5
        )
        new_keys = feeds["key"].reshape(T, HKV, DH).swapaxes(0, 1)
        np.testing.assert_array_equal(out["present_key"][0, :, PAST : PAST + T], new_keys)
