"""export(): the same bytes every time, nothing that does not agree, nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
import torch

from lorgnette.errors import ConfigError, LorgnetteError, VerifyError
from lorgnette.export import reference as reference_module
from lorgnette.export.check import (
    FLOAT_BOUND,
    GREEDY_TOKENS,
    LOGIT_STEPS,
    golden_picture,
    make_golden,
)
from lorgnette.export.checkpoint import open_files
from lorgnette.export.pipeline import export, read_parts
from lorgnette.export.reference import Reference, stream_module
from lorgnette.export.sample_set import Pictures
from lorgnette.export.trace import build_module
from lorgnette.quantize.plan import PLANS, find_plan
from lorgnette.recipe import PlanRule, PlanText, Recipe
from lorgnette.runtime.golden import read_golden
from lorgnette.runtime.preprocess import prepare
from lorgnette.targets.onnx import integer_matmul, operators
from lorgnette.targets.onnx.arguments import Known, graph_value, weight_name
from lorgnette.targets.onnx.graph import GraphBuilder
from tests.quantized import quantized_model

CHECKPOINT = Path(__file__).parents[1] / "zoo" / "checkpoints" / "smolvlm-tiny"

FAST, UNMEASURED = Recipe(quant="int4-fast"), Pictures(measure=0)
"""Integers and rounded activations in the least time."""

Breakage = Callable[..., object]


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# The same bytes


@pytest.mark.parametrize("scheme", [pytest.param("fp32", marks=pytest.mark.slow), "int4"])
def test_the_same_inputs_give_the_same_bytes(tmp_path: Path, scheme: str) -> None:
    other = tmp_path / "elsewhere" / CHECKPOINT.name
    shutil.copytree(CHECKPOINT, other)
    first, second = tmp_path / "first.lorg", tmp_path / "deep" / "er" / "second.lorg"
    # What is measured is on record, so that it must be the same, too.
    export(CHECKPOINT, first, Recipe(quant=scheme), pictures=Pictures(measure=4))
    export(other, second, Recipe(quant=scheme), pictures=Pictures(measure=4))
    one, two = files_of(first), files_of(second)
    assert list(one) == list(two)
    assert [name for name in one if one[name] != two[name]] == []
    for name, data in one.items():
        assert str(tmp_path).encode() not in data, f"{name} names a folder of this machine"


def test_steps_are_told_in_order(tmp_path: Path) -> None:
    steps: list[str] = []
    bundle, ladder = export(
        CHECKPOINT,
        tmp_path / "b.lorg",
        Recipe(quant="int8"),
        pictures=Pictures(measure=4),
        progress=steps.append,
    )
    assert steps == [
        "read checkpoint",
        "calibrate vision_encoder",
        "calibrate decoder",
        "lower vision_encoder",
        "lower token_embedding",
        "lower decoder",
        "reference, original weights",
        "reference, rounded weights",
        "reference, rounded activations",
        "write manifest",
        "original answers",
        "verify onnx-cpu",
        "measure quality",
    ]
    assert ladder.passed
    assert bundle.manifest.quality is not None
    assert bundle.manifest.quality.samples == 4
    assert bundle.path == tmp_path / "b.lorg"


# What does not agree


def gelu(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> object:
    """Another activation of nearly the same shape."""
    value = graph_value(builder, known, node.args[0])
    return builder.node("Gelu", [value], {"approximate": "none"})[0]


def linear_without_bias(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> object:
    bare = SimpleNamespace(args=node.args[:2], meta=node.meta, name=node.name)
    return operators.linear(builder, bare, known)  # type: ignore[arg-type]


def other_epsilon(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> object:
    values = [graph_value(builder, known, argument) for argument in node.args[::2][:2]]
    attributes = {"axis": -1, "epsilon": 1e-2, "stash_type": 1}
    return builder.node("SimplifiedLayerNormalization", values, attributes)[0]


def attention_without_rotation(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> object:
    outputs = operators.cached_attention(builder, node, known)
    made = outputs[0].producer()
    assert made is not None
    made.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 0)
    for place in (7, 8):
        made.replace_input_with(place, None)
    return outputs


BREAKAGES: dict[str, tuple[str, Breakage, str]] = {
    "silu": ("aten.silu.default", gelu, "logits"),
    "gelu": ("aten.gelu.default", gelu, "image_tokens"),
    "bias": ("aten.linear.default", linear_without_bias, "image_tokens"),
    "epsilon": ("aten.rms_norm.default", other_epsilon, "logits"),
    "rotation": (
        "lorgnette.cached_attention.default",
        attention_without_rotation,
        "logits",
    ),
}


@pytest.mark.parametrize(
    "breakage",
    [
        "silu",
        "bias",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("gelu", "epsilon", "rotation")),
    ],
)
def test_a_lowering_that_is_wrong_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breakage: str
) -> None:
    operator, broken, rung = BREAKAGES[breakage]
    monkeypatch.setitem(operators.TRANSLATIONS, operator, broken)
    with pytest.raises(VerifyError, match=f"rung '{rung}' failed") as caught:
        export(CHECKPOINT, tmp_path / "b.lorg", Recipe())
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def layer_norm_epsilon(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> object:
    values = [graph_value(builder, known, node.args[i]) for i in (0, 2, 3)]
    return builder.node("LayerNormalization", values, {"axis": -1, "epsilon": 1e-3})[0]


def linear_without_one_bias(builder: GraphBuilder, node: torch.fx.Node, known: Known) -> object:
    if weight_name(builder, known, node.args[1]) == "tower.layers.1.mlp.fc2.weight":
        return linear_without_bias(builder, node, known)
    return operators.linear(builder, node, known)


def linear_with_two_scales_swapped(
    builder: GraphBuilder, node: torch.fx.Node, known: Known
) -> object:
    out = operators.linear(builder, node, known)
    if weight_name(builder, known, node.args[1]) == "tower.layers.1.mlp.fc1.weight":
        add = out.producer()
        scaled = add.inputs[0].producer() if add is not None and add.inputs[0] else None
        product = scaled.inputs[0].producer() if scaled is not None and scaled.inputs[0] else None
        assert product is not None
        scales = product.inputs[3]
        assert scales is not None
        order = np.arange(scales.shape[0] if scales.shape else 0)
        order[[4, 5]] = order[[5, 4]]
        (swapped,) = builder.node("Gather", [scales, builder.constant(order)])
        product.replace_input_with(3, swapped)
    return out


ROUNDED_BREAKAGES: dict[str, tuple[str, Breakage, str]] = {
    "epsilon": BREAKAGES["epsilon"],
    "silu": BREAKAGES["silu"],
    "gelu": BREAKAGES["gelu"],
    "one bias": ("aten.linear.default", linear_without_one_bias, "image_tokens"),
    "two scales": ("aten.linear.default", linear_with_two_scales_swapped, "image_tokens"),
    "norm": ("aten.layer_norm.default", layer_norm_epsilon, "image_tokens"),
}


@pytest.mark.parametrize(
    "breakage",
    [
        "epsilon",
        "gelu",
        "two scales",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("silu", "one bias", "norm")),
    ],
)
def test_rounded_activations_hide_no_wrong_lowering(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breakage: str
) -> None:
    """Bounds with room for rounding may let these pass: the twin without rounding does not."""
    operator, broken, rung = ROUNDED_BREAKAGES[breakage]
    monkeypatch.setitem(operators.TRANSLATIONS, operator, broken)
    with pytest.raises(VerifyError, match=f"rung '{rung}' failed"):
        export(CHECKPOINT, tmp_path / "b.lorg", FAST, pictures=UNMEASURED)
    assert list(tmp_path.iterdir()) == []


def test_rounding_that_is_too_coarse_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the twin cannot see, the bound of the graph that ships does."""
    monkeypatch.setattr(integer_matmul, "LEAST_SCALE", 0.3)
    with pytest.raises(VerifyError, match="rung 'image_tokens' failed"):
        export(CHECKPOINT, tmp_path / "b.lorg", FAST, pictures=UNMEASURED)
    assert list(tmp_path.iterdir()) == []


def test_the_twin_is_not_shipped(tmp_path: Path) -> None:
    bundle, ladder = export(CHECKPOINT, tmp_path / "b.lorg", FAST, pictures=UNMEASURED)
    graphs = sorted(path.name for path in (bundle.path / "graphs").iterdir())
    names = ("decoder", "prefill", "prefill_weights", "token_embedding", "vision_encoder")
    assert graphs == [*(f"{name}.onnx" for name in names), "weights.bin"]
    assert set(files_of(bundle.path)) == {f.path for f in bundle.manifest.files} | {"manifest.json"}
    # What ships does round: its own error is far above that of float32.
    bounds = bundle.manifest.golden.bounds
    for rung, bound in zip(ladder.rungs[2:4], (bounds.image_tokens, bounds.logits), strict=True):
        assert rung.error is not None
        assert FLOAT_BOUND < rung.error < bound < 0.2


def test_a_bundle_is_not_replaced_by_one_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "b.lorg"
    export(CHECKPOINT, out, Recipe())
    before = files_of(out)
    with pytest.raises(LorgnetteError, match="exists already"):
        export(CHECKPOINT, out, Recipe())
    monkeypatch.setitem(operators.TRANSLATIONS, "aten.linear.default", linear_without_bias)
    with pytest.raises(VerifyError):
        export(CHECKPOINT, out, FAST, pictures=UNMEASURED, replace=True)
    assert files_of(out) == before
    assert list(tmp_path.iterdir()) == [out]


def test_a_broken_promise_leaves_nothing_behind_unless_loss_is_accepted(tmp_path: Path) -> None:
    rule = PlanRule(select="*", bits=4)
    recipe = Recipe(quant="proud", plan=PlanText(name="proud", rule=(rule,), max_kl=1e-9))
    out = tmp_path / "b.lorg"
    with pytest.raises(VerifyError, match="further from the original's than the plan promises"):
        export(CHECKPOINT, out, recipe, pictures=Pictures(measure=2))
    assert list(tmp_path.iterdir()) == []
    bundle, _ = export(CHECKPOINT, out, recipe, pictures=Pictures(measure=2, accept_loss=True))
    quality = bundle.manifest.quality
    assert quality is not None
    assert quality.kl_mean > 1e-9
    assert quality.promise is not None
    assert (quality.promise.kept, quality.promise.accepted_loss) == (False, True)


def test_an_operator_without_translation_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(operators.TRANSLATIONS, "aten.silu.default")
    with pytest.raises(ConfigError, match=r"operator 'aten.silu.default' has no translation"):
        export(CHECKPOINT, tmp_path / "b.lorg", Recipe())
    assert list(tmp_path.iterdir()) == []


# Recipes


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(quant="int3"), "unknown scheme"),
        (Recipe(target="abacus"), "unknown target"),
        (Recipe(context_length=1), "context length is out of range"),
        (Recipe(context_length=1025), "context length is out of range: got 1025, wanted 2 to 1024"),
        (Recipe(context_length=64), r"too small for a picture .*: got 64, wanted \d+ or more"),
        (Recipe(longest_edge=63), "longest_edge is out of range"),
        (Recipe(longest_edge=4097), "longest_edge is out of range"),
        (Recipe(max_tiles=0), "cannot limit the tiles"),
        (Recipe(max_tiles=5, longest_edge=128), "say the same thing"),
    ],
)
def test_recipes_that_cannot_be_are_refused_first(
    tmp_path: Path, recipe: Recipe, message: str
) -> None:
    steps: list[str] = []
    with pytest.raises(LorgnetteError, match=message):
        export(CHECKPOINT, tmp_path / "b.lorg", recipe, progress=steps.append)
    assert steps == ["read checkpoint"]
    assert list(tmp_path.iterdir()) == []


def test_the_least_context_is_enough(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        export(CHECKPOINT, tmp_path / "b.lorg", Recipe(context_length=2))
    least = int(str(caught.value.wanted).split()[0])
    with pytest.raises(ConfigError):
        export(CHECKPOINT, tmp_path / "b.lorg", Recipe(context_length=least - 1))
    bundle, _ = export(CHECKPOINT, tmp_path / "b.lorg", Recipe(context_length=least))
    assert bundle.manifest.context_length == least


@pytest.mark.parametrize(
    ("recipe", "edge", "split"),
    [
        (Recipe(), 128, True),
        (Recipe(max_tiles=1), 64, True),
        (Recipe(max_tiles=4), 64, True),
        (Recipe(max_tiles=5), 128, True),
        (Recipe(max_tiles=99), 128, True),
        (Recipe(longest_edge=64), 64, True),
        (Recipe(longest_edge=4096), 4096, True),
        (Recipe(split=False), 128, False),
        (Recipe(split=True), 128, True),
    ],
)
def test_recipes_choose_the_size(recipe: Recipe, edge: int, split: bool) -> None:
    preprocess = read_parts(open_files(CHECKPOINT), recipe).preprocess
    assert (preprocess.longest_edge, preprocess.split) == (edge, split)
    if recipe.max_tiles is not None:
        square = np.zeros((200, 200, 3), np.uint8)
        assert len(prepare(square, preprocess).pixels) <= recipe.max_tiles


# The reference


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the modules that are read layer by layer."""
    streamed: list[str] = []
    real = stream_module

    def watched(module: torch.nn.Module, *rest: object) -> None:
        streamed.append(type(module).__name__)
        real(module, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(reference_module, "stream_module", watched)
    return streamed


@pytest.mark.parametrize("scheme", [None, "int4-fast"])
def test_reading_layer_by_layer_gives_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch, reads: list[str], scheme: str | None, tmp_path: Path
) -> None:
    parts = read_parts(open_files(CHECKPOINT), Recipe())
    components = {component.name: component for component in parts.components}
    model = quantized_model(tmp_path, components, parts.sources, find_plan(scheme or "fp32"))
    tiles = prepare(golden_picture(), parts.preprocess).pixels
    ids = [1, 40, 80, 120]

    def numbers() -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
        reference = Reference(components, model.sources)
        embeddings = reference.embed(ids)
        logits, answer = reference.generate(embeddings, 3, ())
        logits = np.concatenate([logits, reference.follow(embeddings, answer)])
        return reference.encode(tiles), embeddings, logits, answer

    resident = numbers()
    assert reads == []
    monkeypatch.setattr(reference_module, "RESIDENT_BYTES", 0)
    streamed = numbers()
    assert len(reads) == 3
    for one, two in zip(resident[:3], streamed[:3], strict=True):
        np.testing.assert_array_equal(one, two)
    assert resident[3] == streamed[3]


def test_a_streamed_module_holds_nothing_between_runs() -> None:
    parts = read_parts(open_files(CHECKPOINT), Recipe())
    component = parts.components[1]
    module = build_module(component)
    stream_module(module, parts.sources[component.name])
    for _ in range(2):
        assert all(value.is_meta for value in module.state_dict().values())
        with torch.no_grad():
            assert not module(torch.tensor([[1, 2]])).is_meta
    assert all(value.is_meta for value in module.state_dict().values())


def test_a_plan_changes_only_what_it_rounds(tmp_path: Path) -> None:
    parts = read_parts(open_files(CHECKPOINT), Recipe())
    components = {component.name: component for component in parts.components}
    ids = [5, 6, 7]
    plain = Reference(components, parts.sources).embed(ids)
    same, half, int4 = (
        Reference(
            components, quantized_model(tmp_path, components, parts.sources, plan).sources
        ).embed(ids)
        for plan in (PLANS["fp32"], PLANS["fp16"], PLANS["int4-fast"])
    )
    np.testing.assert_array_equal(plain, same)
    # The checkpoint is stored in float16, so this rounding changes nothing.
    np.testing.assert_array_equal(plain, half)
    assert 0.01 < np.abs(int4 - plain).max() / np.abs(plain).max() < 0.2
    # Sixteen codes a group, and one scale.
    for row in int4.reshape(-1, 32):
        assert len(np.unique(row)) <= 16


def test_followed_tokens_give_the_logits_that_greedy_ones_were_chosen_from() -> None:
    parts = read_parts(open_files(CHECKPOINT), Recipe())
    components = {component.name: component for component in parts.components}
    reference = Reference(components, parts.sources)
    embeddings = reference.embed([1, 40, 80, 120])
    logits, greedy = reference.generate(embeddings, 5, ())
    assert greedy == [int(row.argmax()) for row in logits]
    np.testing.assert_allclose(reference.follow(embeddings, greedy), logits, atol=1e-4)
    other = reference.follow(embeddings, [9, greedy[0], 9])
    assert other.shape == (3, logits.shape[1])
    np.testing.assert_allclose(other[0], logits[0], atol=1e-4)
    assert np.abs(other[1] - logits[1]).max() > 1e-3
    whole = np.concatenate([embeddings, reference.embed([9, greedy[0]])])
    np.testing.assert_allclose(reference.generate(whole, 1, ())[0][0], other[2], atol=1e-4)
    np.testing.assert_allclose(reference.follow(embeddings, [9])[0], logits[0], atol=1e-4)
    # A stop token ends a greedy answer and is part of it.
    stopped, short = reference.generate(embeddings, 5, (greedy[1],))
    assert short == greedy[: greedy.index(greedy[1]) + 1]
    assert len(stopped) == len(short)


# Golden data


def test_golden_data_is_small_and_of_the_original(tmp_path: Path) -> None:
    parts = read_parts(open_files(CHECKPOINT), Recipe())
    components = {component.name: component for component in parts.components}
    plain, rounded = (
        make_golden(
            parts,
            quantized_model(tmp_path, components, parts.sources, PLANS[name]),
            lambda step: None,
        )
        for name in ("fp32", "int4-fast")
    )
    greedy = plain.text.original_greedy_ids
    assert rounded.text.original_greedy_ids == greedy
    assert 1 <= len(greedy) <= GREEDY_TOKENS
    assert len(plain.logits) == len(rounded.logits) == min(len(greedy), LOGIT_STEPS)
    assert [int(row.argmax()) for row in plain.logits] == list(greedy[: len(plain.logits)])
    assert plain.text.rounding_logits == plain.text.rounding_image_tokens == 0
    assert 0 < rounded.text.rounding_logits < 1
    assert plain.text.rounding_activations == plain.text.rounding_activations_image_tokens == 0
    assert 1e-3 < rounded.text.rounding_activations_image_tokens < 0.05
    assert 1e-3 < rounded.text.rounding_activations < 0.05
    np.testing.assert_array_equal(plain.picture, golden_picture())


def test_golden_pictures_take_the_tiling_path(tmp_path: Path) -> None:
    bundle, _ = export(CHECKPOINT, tmp_path / "b.lorg", Recipe(quant="fp16"))
    golden = read_golden(bundle)
    assert golden.text.rows * golden.text.cols > 1
    assert len(golden.image_tokens) == golden.text.rows * golden.text.cols + 1
    size = sum(path.stat().st_size for path in (bundle.path / "golden").iterdir())
    assert size < 200_000
    manifest = json.loads((bundle.path / "manifest.json").read_text())
    assert manifest["golden"]["bounds"]["greedy_ids_equal"] is False
