"""Cached attention at the head sizes of the families, in this engine and the oldest supported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lorgnette.export.component import Component, TensorSpec
from lorgnette.export.layers.attention import cached_attention, cached_math
from lorgnette.export.layers.rope import rope_tables
from lorgnette.quantize.plan import PLANS
from lorgnette.targets.onnx.lowering import OnnxCpu
from tests.small import Array, Lowered, lower, single

CAPACITY = 40
CHUNKS = (17, 1, 1, 12, 1)
HEADS = [
    pytest.param(2, 2, 80, id="mha-80"),
    pytest.param(4, 4, 128, id="mha-128"),
    pytest.param(14, 2, 64, id="gqa-14-2-64"),
    pytest.param(32, 32, 80, id="mha-32-80"),
]
RUN = """
import sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
names = [i.name for i in session.get_inputs()]
calls = numpy.load(sys.argv[2])
cache, found = [calls["key"], calls["value"]], []
past = 0
for count in calls["chunks"]:
    qkv = calls["qkv"][:, past : past + count]
    inputs = [qkv, numpy.array([past], numpy.int32), *cache]
    out, *cache = session.run(None, dict(zip(names, inputs, strict=True)))
    found.append(out)
    past += count
numpy.savez(sys.argv[3], out=numpy.concatenate(found, axis=1), key=cache[0], value=cache[1])
print(onnxruntime.__version__)
"""


class Attention(nn.Module):
    """Cached attention with rotary tables."""

    cos: Tensor
    sin: Tensor

    def __init__(self, heads: int, kv_heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.cos = nn.Buffer(torch.empty(CAPACITY, size // 2))
        self.sin = nn.Buffer(torch.empty(CAPACITY, size // 2))

    def forward(
        self, qkv: Tensor, past: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return cached_attention(  # type: ignore[no-any-return]
            qkv, key, value, self.cos, self.sin, past, self.heads, self.kv_heads
        )


def component(heads: int, kv_heads: int, size: int) -> Component:
    """The operator alone, from queries, keys and values to what they attend to."""
    cache = (1, kv_heads, "S", size)
    return single(
        lambda: Attention(heads, kv_heads, size),
        (
            TensorSpec("qkv", torch.float32, (1, "T", (heads + 2 * kv_heads) * size)),
            TensorSpec("past", torch.int32, (1,)),
            TensorSpec("key", torch.float32, cache),
            TensorSpec("value", torch.float32, cache),
        ),
        (
            TensorSpec("out", torch.float32, (1, "T", heads * size)),
            TensorSpec("key_out", torch.float32, cache),
            TensorSpec("value_out", torch.float32, cache),
        ),
        axes={"T": (1, CAPACITY), "S": (2, CAPACITY)},
    )


def lowered_attention(folder: Path, heads: int, kv_heads: int, size: int) -> Lowered:
    """The operator as a graph."""
    cos, sin = rope_tables(CAPACITY, size, 10000.0)
    made = component(heads, kv_heads, size)
    return lower(folder, made, {"cos": cos, "sin": sin}, PLANS["fp32"])


def feeds(heads: int, kv_heads: int, size: int) -> dict[str, Array]:
    """All positions of a prompt, and a cache of nonsense that must not count."""
    generator = np.random.default_rng(2)
    shape = (1, sum(CHUNKS), (heads + 2 * kv_heads) * size)
    cache = np.full((1, kv_heads, CAPACITY, size), 1e3, np.float32)
    qkv = generator.standard_normal(shape, dtype=np.float32)
    return {"qkv": qkv, "key": cache, "value": cache.copy(), "chunks": np.array(CHUNKS)}


def expected(given: dict[str, Array], heads: int, kv_heads: int, size: int) -> list[Array]:
    """One pass in float64, written apart from the code that is tested."""
    total = given["qkv"].shape[1]
    rows = given["qkv"][0].astype(np.float64).reshape(total, heads + 2 * kv_heads, size)
    frequencies = 10000.0 ** (-np.arange(0, size, 2) / size)
    turn = np.exp(1j * np.arange(total)[:, None] * frequencies)[:, None]
    pairs = (rows[..., : size // 2] + 1j * rows[..., size // 2 :]) * turn
    turned = np.concatenate([pairs.real, pairs.imag], axis=-1)
    query, key = turned[:, :heads], turned[:, heads : heads + kv_heads]
    value = rows[:, heads + kv_heads :]
    out = np.empty((total, heads, size))
    for head in range(heads):
        group = head // (heads // kv_heads)
        scores = query[:, head] @ key[:, group].T / np.sqrt(size)
        scores[np.triu_indices(total, 1)] = -np.inf
        shares = np.exp(scores - scores.max(1, keepdims=True))
        out[:, head] = shares / shares.sum(1, keepdims=True) @ value[:, group]
    return [
        out.reshape(1, total, heads * size),
        key.swapaxes(0, 1)[None],
        value.swapaxes(0, 1)[None],
    ]


def hold(got: list[Any], given: dict[str, Array], heads: int, kv_heads: int, size: int) -> None:
    """Compares attended values and both caches, and that nothing else was written."""
    total = sum(CHUNKS)
    out, key, value = expected(given, heads, kv_heads, size)
    assert np.abs(got[0] - out).max() <= 1e-5
    assert np.abs(got[1][:, :, :total] - key).max() <= 1e-5
    assert np.array_equal(got[2][:, :, :total], value.astype(np.float32))


@pytest.mark.parametrize(("heads", "kv_heads", "size"), HEADS)
def test_the_definition(heads: int, kv_heads: int, size: int) -> None:
    given = feeds(heads, kv_heads, size)
    cos, sin = rope_tables(CAPACITY, size, 10000.0)
    key, value = torch.from_numpy(given["key"]), torch.from_numpy(given["value"])
    past, found = 0, []
    for count in CHUNKS:
        qkv = torch.from_numpy(given["qkv"][:, past : past + count])
        at = torch.tensor([past], dtype=torch.int32)
        out, key, value = cached_math(qkv, key, value, cos, sin, at, heads, kv_heads)
        found.append(out)
        past += count
    hold([torch.cat(found, 1).numpy(), key.numpy(), value.numpy()], given, heads, kv_heads, size)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), HEADS)
@pytest.mark.parametrize("engine", ["this", "oldest"])
def test_the_engine_at_the_head_sizes_of_the_families(
    tmp_path: Path,
    heads: int,
    kv_heads: int,
    size: int,
    engine: str,
    request: pytest.FixtureRequest,
) -> None:
    given = feeds(heads, kv_heads, size)
    lowered = lowered_attention(tmp_path, heads, kv_heads, size)
    assert lowered.report.operators["com.microsoft::GroupQueryAttention"] == 1
    environment = request.getfixturevalue("ort_floor_env") if engine == "oldest" else None
    # numpy's stub takes a switch by keyword, and so refuses any mapping of arrays.
    np.savez(tmp_path / "in.npz", **given)  # type: ignore[arg-type]
    files = [lowered.folder / lowered.report.graph, tmp_path / "in.npz", tmp_path / "out.npz"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, files)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    oldest = OnnxCpu.capabilities.engine_min_version
    assert (done.stdout.strip() == oldest) == (engine == "oldest")
    with np.load(files[2]) as out:
        hold([out["out"], out["key"], out["value"]], given, heads, kv_heads, size)
