"""A KV cache of 8 bits: against rounding and attention in float64, and in a bundle."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lorgnette.bundle import open_bundle
from lorgnette.cli.inspect import inspect_bundle
from lorgnette.errors import ConfigError
from lorgnette.export.cache_rounding import round_cache
from lorgnette.export.component import Component, TensorSpec
from lorgnette.export.layers.attention import CachedAttention, cached_attention
from lorgnette.export.layers.rope import rope_tables
from lorgnette.export.pipeline import export
from lorgnette.export.sample_set import Pictures
from lorgnette.export.trace import build_module, trace
from lorgnette.export.weights import WeightSource, module_shapes
from lorgnette.quantize.cache import CacheRanges, cache_scale
from lorgnette.quantize.plan import PLANS, QuantPlan
from lorgnette.recipe import PlanRule, PlanText, Recipe
from lorgnette.runtime.engines import onnx as engine_module
from lorgnette.runtime.engines.onnx import OnnxDecoderState
from lorgnette.runtime.model import Model, open_model
from lorgnette.targets import find_target
from lorgnette.targets.capabilities import scheme_problems
from lorgnette.targets.onnx.lowering import OnnxCpu
from tests.quantized import quantized_source
from tests.small import Array, Lowered, session, single, tensor_folder

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests/zoo/checkpoints/smolvlm-tiny"
CAPACITY = 40
CHUNKS = (17, 1, 1, 12, 1)
HEADS = [
    pytest.param(9, 3, 64, id="gqa-9-3-64"),
    pytest.param(2, 2, 80, id="mha-80"),
    pytest.param(4, 4, 128, id="mha-128"),
    pytest.param(14, 2, 64, id="gqa-14-2-64"),
]
PLAN = replace(PLANS["fp32"], cache_bits=8)


class Attention(nn.Module):
    """Cached attention with rotary tables."""

    cos: Tensor
    sin: Tensor

    def __init__(self, heads: int, kv_heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.cos = nn.Buffer(torch.empty(CAPACITY, size // 2))
        self.sin = nn.Buffer(torch.empty(CAPACITY, size // 2))

    def forward(self, qkv: Tensor, past: Tensor, caches: list[Tensor]) -> tuple[Tensor, ...]:
        cached: tuple[Tensor, ...] = cached_attention(
            qkv, *caches, self.cos, self.sin, past, self.heads, self.kv_heads
        )
        return cached


def component(heads: int, kv_heads: int, size: int) -> Component:
    """The operator alone, its cache where decoders have theirs."""
    caches = [
        TensorSpec(f"{name}_0_{end}", torch.float32, (1, kv_heads, "S", size))
        for end in ("in", "out")
        for name in ("key", "value")
    ]
    alone = single(
        lambda: Attention(heads, kv_heads, size),
        (
            TensorSpec("qkv", torch.float32, (1, "T", (heads + 2 * kv_heads) * size)),
            TensorSpec("past", torch.int32, (1,)),
        ),
        (TensorSpec("out", torch.float32, (1, "T", heads * size)),),
        axes={"T": (1, CAPACITY), "S": (2, CAPACITY)},
    )
    return replace(alone, cache_inputs=tuple(caches[:2]), cache_outputs=tuple(caches[2:]))


def lowered_attention(
    folder: Path, sizes: tuple[int, int, int], scales: dict[str, Array], plan: QuantPlan = PLAN
) -> Lowered:
    """The operator as a graph, its steps as calibration would give them."""
    made = component(*sizes)
    cos, sin = rope_tables(CAPACITY, sizes[2], 10000.0)
    checkpoint = tensor_folder(folder / "checkpoint", {"cos": cos, "sin": sin})
    weights = WeightSource(checkpoint, module_shapes(build_module(made)), made.rules)
    source = quantized_source(folder, made, weights, plan)
    for name, scale in scales.items():
        source.place_cache_scale(name, scale)
    out = folder / "bundle"
    out.mkdir()
    with OnnxCpu().open(out) as lowering:
        report = lowering.add(made, trace(made), source)
    return Lowered(out, report, session(out / report.graph))


def projected(heads: int, kv_heads: int, size: int) -> Array:
    """Queries, keys and values of all positions; one channel of keys is a hundred times larger."""
    shape = (1, sum(CHUNKS), heads + 2 * kv_heads, size)
    made = np.random.default_rng(2).standard_normal(shape, dtype=np.float32)
    made[:, :, heads : heads + kv_heads, 3] *= 100
    return made.reshape(1, sum(CHUNKS), -1)


def turned(qkv: Array, heads: int, kv_heads: int, size: int) -> tuple[Array, Array, Array]:
    """Queries and keys after rotation, and values, in float64: `[T, H, Dh]`."""
    total = qkv.shape[1]
    rows = qkv[0].astype(np.float64).reshape(total, heads + 2 * kv_heads, size)
    frequencies = 10000.0 ** (-np.arange(0, size, 2) / size)
    turn = np.exp(1j * np.arange(total)[:, None] * frequencies)[:, None]
    pairs = (rows[..., : size // 2] + 1j * rows[..., size // 2 :]) * turn
    both = np.concatenate([pairs.real, pairs.imag], axis=-1)
    return both[:, :heads], both[:, heads : heads + kv_heads], rows[:, heads + kv_heads :]


def attended(query: Array, key: Array, value: Array) -> Array:
    """Causal attention in float64, a position and a head at a time."""
    total, heads, size = query.shape
    factor = heads // key.shape[1]
    out = np.empty((total, heads, size))
    for head in range(heads):
        for at in range(total):
            scores = key[: at + 1, head // factor] @ query[at, head] / np.sqrt(size)
            shares = np.exp(scores - scores.max())
            out[at, head] = shares / shares.sum() @ value[: at + 1, head // factor]
    return out.reshape(1, total, -1)


def scales_for(key: Array, value: Array) -> dict[str, Array]:
    """Steps that fit, but for one channel of values, which must be clipped."""
    largest = {"key_0": np.abs(key).max(0), "value_0": np.abs(value).max(0)}
    largest["value_0"][0, 5] /= 3
    return {name: (size / 127).astype(np.float32) for name, size in largest.items()}


def rounded(cached: Array, scale: Array) -> Array:
    """Codes of keys or values."""
    return np.clip(np.rint(cached / scale.astype(np.float64)), -128, 127)


def in_chunks(lowered: Lowered, qkv: Array, dtype: type[np.generic]) -> tuple[Array, list[Array]]:
    """What all positions attend to, run as a prompt and what follows, and the cache at the end."""
    specs = lowered.session.get_inputs()[2:]
    shape = [CAPACITY if axis == "S" else int(axis) for axis in specs[0].shape]
    cache: list[Array] = [np.full(shape, 111, dtype) for _ in specs]
    found, past = [], 0
    for count in CHUNKS:
        out, *cache = lowered.run(qkv[:, past : past + count], np.array([past], np.int32), *cache)
        found.append(out)
        past += count
    return np.concatenate(found, axis=1), cache


@pytest.mark.parametrize(("heads", "kv_heads", "size"), HEADS)
def test_the_engine_rounds_keys_and_values_as_it_caches_them(
    tmp_path: Path, heads: int, kv_heads: int, size: int
) -> None:
    """Codes that stand behind the last position must not count."""
    qkv = projected(heads, kv_heads, size)
    query, key, value = turned(qkv, heads, kv_heads, size)
    scales = scales_for(key, value)
    lowered = lowered_attention(tmp_path, (heads, kv_heads, size), scales)
    out, cache = in_chunks(lowered, qkv, np.int8)
    total, wanted = sum(CHUNKS), {}
    for (name, scale), exact, got in zip(scales.items(), (key, value), cache, strict=True):
        codes = rounded(exact, scale)
        off = got[0, :, :total].astype(np.float64) - codes.swapaxes(0, 1)
        assert np.abs(off).max() <= 1  # keys are rotated in float32: a tie may fall either way
        assert (off != 0).mean() < 1e-3
        assert {-128, 127} <= set(codes.flatten()) or name == "key_0"
        wanted[name] = got[0, :, :total].swapaxes(0, 1) * scale.astype(np.float64)
    assert np.abs(out - attended(query, wanted["key_0"], wanted["value_0"])).max() <= 2e-4
    assert np.abs(out - attended(query, key, value)).max() > 1e-3  # so it is rounded indeed


def test_the_twin_rounds_nothing(tmp_path: Path) -> None:
    heads, kv_heads, size = 4, 2, 64
    qkv = projected(heads, kv_heads, size)
    query, key, value = turned(qkv, heads, kv_heads, size)
    lowered = lowered_attention(tmp_path, (heads, kv_heads, size), scales_for(key, value))
    graph = lowered.folder / lowered.report.graph
    OnnxCpu().write_exact(graph, graph.with_name("exact.onnx"))
    exact = Lowered(lowered.folder, lowered.report, session(graph.with_name("exact.onnx")))
    out, cache = in_chunks(exact, qkv, np.float32)
    assert np.abs(out - attended(query, key, value)).max() <= 2e-4
    assert np.array_equal(cache[1][0, :, : sum(CHUNKS)].swapaxes(0, 1), value.astype(np.float32))


def test_a_cache_without_calibration_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no range is known of a KV cache") as caught:
        lowered_attention(tmp_path, (2, 2, 64), {})
    assert "decoder/key_0" in str(caught.value)


def test_a_target_that_cannot_refuses_a_cache_of_8_bits() -> None:
    able = find_target("onnx-cpu").capabilities
    assert able.takes(PLAN)
    unable = msgspec.structs.replace(able, cache_bits=(32,))
    assert not unable.takes(PLAN)
    (told,) = scheme_problems(unable, PLAN, [])
    assert told == "a KV cache cannot be of 8 bits; nearest: 32"


# The reference


@given(st.integers(0, 99), st.sampled_from([(4, 2), (3, 3)]))
def test_the_reference_attends_to_what_a_cache_holds(seed: int, sizes: tuple[int, int]) -> None:
    heads, kv_heads = sizes
    size, total, width = 8, 6, 24
    torch.manual_seed(seed)
    layer = CachedAttention(width, heads, kv_heads, size).eval().requires_grad_(False)
    cos, sin = rope_tables(total, size, 10000.0)
    x = torch.randn(1, total, width)
    query, key, value = turned(layer.qkv_proj(x).numpy(), heads, kv_heads, size)
    scales = scales_for(key, value)
    round_cache(layer, *(torch.from_numpy(scale) for scale in scales.values()))
    cache = torch.zeros(1, kv_heads, total, size)
    out, keys, _ = layer(x, cache, cache, cos, sin, torch.zeros(1, dtype=torch.int32))
    kept = [rounded(e, s) * s for e, s in zip((key, value), scales.values(), strict=True)]
    wanted = attended(query, *kept) @ layer.o_proj.weight.numpy().T.astype(np.float64)
    ties = np.abs(keys[0].numpy().swapaxes(0, 1) - kept[0]) > 1e-4 * np.abs(kept[0]).max()
    if not ties.any():  # where float32 rotates a key past a half, another code is right, too
        assert np.abs(out.numpy() - wanted).max() <= 1e-4
    assert ties.sum() <= 1


@given(st.lists(st.floats(0, 2.0**99, width=32), min_size=1, max_size=5))
def test_steps_fit_a_tenth_more_than_was_seen(largest: list[float]) -> None:
    for size, step in zip(largest, cache_scale(np.array(largest, np.float32)), strict=True):
        assert step > 0
        assert abs(127 * float(step) - 1.1 * size) <= 1e-6 * size + 1e-25


def test_ranges_are_the_largest_of_all_that_was_seen() -> None:
    ranges = CacheRanges()
    keys, values = torch.randn(3, 1, 2, 5, 4).unbind(0)[:2]
    ranges.add(keys, values)
    ranges.add(keys * 2, -values)
    assert torch.equal(ranges._largest["key"], 2 * keys.abs().amax((0, 2)))
    assert torch.equal(ranges._largest["value"], values.abs().amax((0, 2)))
    ranges.clear()
    assert not ranges._largest


# A bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained checkpoint with a cache of 8 bits and float32 weights."""
    path = tmp_path_factory.mktemp("cache8") / "c.lorg"
    plan = PlanText(name="small-cache", rule=(PlanRule(select="*", bits=32),), cache_bits=8)
    recipe = Recipe(quant=plan.name, plan=plan, context_length=256)
    _, ladder = export(CHECKPOINT, path, recipe, pictures=Pictures(measure=0))
    assert all(rung.passed for rung in ladder.rungs)
    return path


def test_a_bundle_says_that_its_cache_is_of_8_bits(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    assert manifest.requires == ("tiles", "cache8")
    decoder = manifest.component("decoder")
    assert {t.dtype for t in (*decoder.cache_inputs, *decoder.cache_outputs)} == {"int8"}
    # Rounding costs something, and is bounded by what it cost the reference.
    assert 0.02 < manifest.golden.bounds.logits < 0.1
    assert manifest.golden.bounds.image_tokens < 1e-4
    text = manifest.spec.text
    position = text.layers * 2 * text.kv_heads * text.head_size
    assert inspect_bundle(bundle)["kv_cache_bytes"]["per_1000_tokens"] == 1000 * position


def test_a_cache_of_8_bits_grows_and_keeps_what_it_held(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(bundle, threads=1)
    ids = np.random.default_rng(0).integers(3, 400, 40)

    def answer(model: Model, cuts: list[int]) -> tuple[Array, OnnxDecoderState]:
        state = model.engine.new_state()
        assert isinstance(state, OnnxDecoderState)
        for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
            logits = state.run(model.engine.embed(ids[start:end]), start).copy()
        return logits, state

    whole, state = answer(model, [])
    assert {cache.dtype for cache in state._caches} == {np.dtype(np.int8)}
    assert [t.data_ptr() for t in state._bindings["decoder"].get_outputs()][1:] == [
        cache.ctypes.data for cache in state._caches
    ]
    assert not any(cache[:, :, 40:].any() for cache in state._caches)
    monkeypatch.setattr(engine_module, "FIRST_POSITIONS", 4)
    logits, grown = answer(model, [3, 4, 5, 17])
    assert grown._caches[0].shape[2] == 64
    same = [
        np.mean(one[:, :, :40] == other[:, :, :40])
        for one, other in zip(state._caches, grown._caches, strict=True)
    ]
    assert min(same) > 0.98  # sums in another order now and then round to the next code
    assert np.linalg.norm(logits - whole) <= 0.02 * np.linalg.norm(whole)


def test_an_engine_that_cannot_is_told_from_a_broken_bundle(
    bundle: Path, ort_floor_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lorgnette", "verify", str(bundle)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ort_floor_path), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "onnxruntime 1.24.2 refuses the graph" in done.stderr
    assert "its KV cache is of 8 bits: update onnxruntime" in done.stderr
