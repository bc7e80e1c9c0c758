"""export() of MobileVLM and OmniVLM: bundles that answer as an oracle outside this project does."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn import functional

from lorgnette.errors import VerifyError
from lorgnette.export.check import GREEDY_TOKENS, QUESTION, golden_picture
from lorgnette.export.component import Component
from lorgnette.export.families import mobilevlm as mobilevlm_family
from lorgnette.export.layers import projectors, vision
from lorgnette.export.layers.mlp import MLP
from lorgnette.export.pipeline import export
from lorgnette.export.sample_set import Pictures
from lorgnette.export.trace import trace
from lorgnette.quantize.plan import PLANS
from lorgnette.recipe import Recipe
from lorgnette.runtime.golden import Golden, GoldenText, read_golden, write_golden
from lorgnette.runtime.model import open_model
from lorgnette.runtime.preprocess import prepare
from lorgnette.runtime.verify import relative_error
from lorgnette.spec import VisionSpec
from tests.eager import Eager
from tests.family_cases import CASES, Made, Pixels, picture
from tests.make_omnivlm import make_gguf_pair

TOLERANCE = 1e-4
ANSWER = 20
QUESTIONS = ("What is in this picture, and where is it?", " Räume 🙂 42\n\n two  spaces ")
SIZES = [(1, 1), (300, 7), (9, 200), (64, 48), (48, 48), (90, 91)]
"""Width and height of pictures."""


QUICK = {
    "mobilevlm-v1": ("fp32", "int4-fast"),
    "mobilevlm-v2": ("fp32", "fp16", "int8", "int4"),
    "omnivlm": ("fp32", "int8", "int4"),
    "nano-vlm-instruct": ("fp32", "int4-fast"),
    "omnivlm-gguf-F16": ("fp32", "fp16"),
    "omnivlm-gguf-Q8_0": ("fp32", "int4"),
}
"""The schemes that the default run exports; `-m slow` exports the others."""
MOST_LOST = {"fp32": 0.0, "fp16": 0.005, "int8": 0.1, "int4": 1.0, "int4-fast": 1.0}
KERNELS = {
    "mobilevlm-v1": ["projector.block1.depthwise.weight", "projector.block2.depthwise.weight"],
    "mobilevlm-v2": ["projector.depthwise.weight"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """The checkpoint of a case, made once."""
    found: dict[str, Made] = {}

    def made(name: str) -> Made:
        if name not in found:
            found[name] = Made(CASES[name], tmp_path_factory.mktemp(name))
        return found[name]

    return made


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def worst(got: NDArray[np.float32], wanted: Tensor) -> float:
    """The largest difference, in units of the largest value wanted."""
    assert got.shape == tuple(wanted.shape)
    return float((torch.from_numpy(got) - wanted).abs().max() / wanted.abs().max())


# Every scheme climbs the ladder


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        pytest.param(
            name,
            scheme,
            marks=() if scheme in QUICK[name] else pytest.mark.slow,
            id=f"{name}-{scheme}",
        )
        for name in CASES
        for scheme in PLANS
    ],
)
def test_a_bundle_of_every_scheme_records_what_the_oracle_says(
    made: Callable[[str], Made], name: str, scheme: str
) -> None:
    """The ladder compares with our own reference; here that reference meets the oracle."""
    this = made(name)
    model = open_model(this.bundle(scheme), threads=1)
    golden, oracle = read_golden(model.bundle), this.oracle
    ids, tile = this.case.ids(QUESTION), this.case.tile(golden_picture())
    assert list(golden.text.prompt_ids) == ids
    greedy = until_stop(this, ids, tile, GREEDY_TOKENS)
    assert list(golden.text.original_greedy_ids) == greedy
    steps = len(golden.logits)
    image_tokens = oracle.encode(tile).numpy()
    logits = oracle.logits(ids + greedy[: steps - 1], tile)[-steps:].numpy()
    # How far rounding moved the model away from the original is recorded, and is so far.
    for got, wanted, recorded in (
        (golden.image_tokens, image_tokens, golden.text.rounding_image_tokens),
        (golden.logits, logits, golden.text.rounding_logits),
    ):
        assert relative_error(got, wanted) == pytest.approx(recorded, abs=TOLERANCE)
        # Random weights are hurt most; ones stored in half precision lose nothing to fp16.
        assert recorded <= MOST_LOST[scheme]
    # Vision on integer kernels rounds its activations too, by what the reference emulates.
    off = relative_error(model.engine.encode(tile), golden.image_tokens)
    rounding = golden.text.rounding_activations_image_tokens
    assert (rounding > 0) is scheme.startswith("int")
    assert off <= TOLERANCE + 2 * rounding
    assert off >= rounding / 2
    kernels = [] if scheme == "fp32" else KERNELS.get(name, [])
    kept = {n: r for entry in model.manifest.components for n, r in entry.kept_in_float.items()}
    assert list(kept) == kernels
    assert all("kernel" in reason for reason in kept.values())


def until_stop(this: Made, ids: list[int], tile: Pixels, count: int) -> list[int]:
    """The oracle's greedy answer, a stop token included."""
    answer = this.oracle.greedy(ids, tile, count)
    ends = [at + 1 for at, token in enumerate(answer) if token in this.case.stops]
    return answer[: min(ends, default=count)]


# The answer is the oracle's


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_answers_are_the_oracles(
    made: Callable[[str], Made], name: str, size: tuple[int, int]
) -> None:
    this, source = made(name), picture(*size)
    question = QUESTIONS[SIZES.index(size) % 2]
    ids, tile = this.case.ids(question), this.case.tile(source)
    np.testing.assert_array_equal(prepare(source, this.model.manifest.preprocess).pixels, tile)
    result = this.model.generate(source, question, max_new_tokens=ANSWER).result()
    assert result.image_tokens == ids.count(this.oracle.image_id)
    assert result.prompt_tokens == len(ids)
    assert list(result.token_ids) == until_stop(this, ids, tile, ANSWER)


@pytest.mark.parametrize("name", ["mobilevlm-v2", "omnivlm"])
def test_the_answer_depends_on_picture_and_question(made: Callable[[str], Made], name: str) -> None:
    """A model that looks at neither would agree with an oracle that looks at neither."""
    model, light = made(name).model, picture(60, 60)

    def answer(source: Pixels, question: str) -> tuple[int, ...]:
        return model.generate(source, question, max_new_tokens=8).result().token_ids

    asked = [(light, "Who?"), (255 - light, "Who?"), (light, "Where is it?")]
    assert len({answer(*pair) for pair in asked}) == 3


# The same bytes


@pytest.mark.parametrize(
    ("name", "scheme"), [("mobilevlm-v2", "int4"), ("omnivlm-gguf-Q8_0", "int4")]
)
def test_the_same_inputs_give_the_same_bytes(
    made: Callable[[str], Made], tmp_path: Path, name: str, scheme: str
) -> None:
    this = made(name)
    other = tmp_path / "elsewhere" / this.checkpoint.name
    shutil.copytree(this.checkpoint, other)
    recipe, unmeasured = Recipe(quant=scheme), Pictures(measure=0)
    export(other, tmp_path / "second.lorg", recipe, pictures=unmeasured)
    one, two = files_of(this.bundle(scheme)), files_of(tmp_path / "second.lorg")
    assert list(one) == list(two)
    assert [file for file in one if one[file] != two[file]] == []
    for file, data in one.items():
        assert str(tmp_path).encode() not in data, f"{file} names a folder of this machine"


def test_a_gguf_pair_of_float32_is_the_normal_form(
    made: Callable[[str], Made], tmp_path: Path
) -> None:
    normal = made("omnivlm")
    decoder, tower = make_gguf_pair(tmp_path / "pair", normal.case.config, kind="F32")
    bundle, _ = export(decoder, tmp_path / "pair.lorg", Recipe(), vision=tower)
    pair, wanted = files_of(bundle.path), files_of(normal.bundle("fp32"))
    same = [file for file in wanted if pair[file] == wanted[file]]
    # The tokenizer is rebuilt from another form, and the manifest has its digest.
    assert set(wanted) - set(same) <= {"manifest.json", "tokenizer/tokenizer.json"}
    assert "graphs/weights.bin" in same
    model, source = open_model(bundle.path, threads=1), picture(70, 50)
    for question in QUESTIONS:
        answers = [
            each.generate(source, question, max_new_tokens=ANSWER).result()
            for each in (model, normal.model)
        ]
        assert answers[0].token_ids == answers[1].token_ids
        assert answers[0].text == answers[1].text


# What the ladder and what only the oracle can catch


def keep_class_token(self: vision.ClipTower, tiles: Tensor) -> Tensor:
    x = self.pre_norm(self.embed(tiles))
    for layer in self.layers:
        x = layer(x)
    return x[:, :-1]  # type: ignore[no-any-return]


def no_pre_norm(self: vision.ClipTower, tiles: Tensor) -> Tensor:
    x = self.embed(tiles)
    for layer in self.layers:
        x = layer(x)
    return x[:, 1:]  # type: ignore[no-any-return]


def no_final_norm(self: vision.SiglipTower, tiles: Tensor) -> Tensor:
    x = self.embed(tiles)
    for layer in self.layers:
        x = layer(x)
    return x  # type: ignore[no-any-return]


def square_blocks(self: projectors.ConcatProjector, x: Tensor) -> Tensor:
    return self.mlp(projectors.pixel_shuffle(x, 9, 3))  # type: ignore[no-any-return]


def strided_tokens(self: projectors.ConcatProjector, x: Tensor) -> Tensor:
    """Every ninth token joined in place of nine behind each other."""
    count, _, width = x.shape
    return self.mlp(x.reshape(count, 9, 9, width).transpose(1, 2).reshape(count, 9, 9 * width))  # type: ignore[no-any-return]


def residual_after_both(self: projectors.LdpProjector, x: Tensor) -> Tensor:
    """The first block without its input."""
    self.block1.residual = False
    return self.block2(self.block1(self.mlp(x)))  # type: ignore[no-any-return]


def largest_of_four(self: projectors.LdpV2Projector, x: Tensor) -> Tensor:
    pooled = functional.max_pool2d(projectors.to_map(self.mlp(x), self.grid), 2)
    return projectors.to_tokens(pooled + self.depthwise(pooled))


def no_skip(self: projectors.LdpV2Projector, x: Tensor) -> Tensor:
    pooled = functional.avg_pool2d(projectors.to_map(self.mlp(x), self.grid), 2)
    return projectors.to_tokens(self.depthwise(pooled))


def column_major(self: projectors.LdpV2Projector, x: Tensor) -> Tensor:
    """Tokens of a map read column by column."""
    pooled = functional.avg_pool2d(projectors.to_map(self.mlp(x), self.grid), 2)
    return projectors.to_tokens((pooled + self.depthwise(pooled)).transpose(2, 3))


def exact_gelu(self: MLP, x: Tensor) -> Tensor:
    """One GELU for all."""
    return self.fc2(functional.gelu(self.fc1(x)))  # type: ignore[no-any-return]


MUTATIONS: dict[str, tuple[str, type, Callable[..., Tensor]]] = {
    "the class token stays": ("mobilevlm-v2", vision.ClipTower, keep_class_token),
    "no norm before CLIP": ("mobilevlm-v1", vision.ClipTower, no_pre_norm),
    "no norm behind SigLIP": ("omnivlm", vision.SiglipTower, no_final_norm),
    "groups are 3 x 3 blocks": ("omnivlm", projectors.ConcatProjector, square_blocks),
    "groups are every ninth token": ("omnivlm", projectors.ConcatProjector, strided_tokens),
    "no residual": ("mobilevlm-v1", projectors.LdpProjector, residual_after_both),
    "maximum for mean": ("mobilevlm-v2", projectors.LdpV2Projector, largest_of_four),
    "no skip": ("mobilevlm-v2", projectors.LdpV2Projector, no_skip),
    "column by column": ("mobilevlm-v2", projectors.LdpV2Projector, column_major),
    "CLIP with the exact GELU": ("mobilevlm-v2", MLP, exact_gelu),
    "SigLIP with the exact GELU": ("omnivlm", MLP, exact_gelu),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_misread_layer_cannot_pass_for_the_oracle(
    made: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch, mutation: str
) -> None:
    """The graph and our reference would both have it, so that the ladder would hold."""
    name, layer, wrong = MUTATIONS[mutation]
    this = made(name)
    tile = this.case.tile(golden_picture())
    wanted = this.oracle.encode(tile)
    assert worst(Eager(this.checkpoint).encode(tile).numpy(), wanted) <= TOLERANCE
    monkeypatch.setattr(layer, "forward", wrong)
    assert worst(Eager(this.checkpoint).encode(tile).numpy(), wanted) > 2 * TOLERANCE


def test_the_last_layer_of_clip_would_be_seen(
    made: Callable[[str], Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    this, tower = made("mobilevlm-v2"), vision.ClipTower
    tile = this.case.tile(golden_picture())

    def whole(spec: VisionSpec) -> vision.ClipTower:
        return tower(msgspec.structs.replace(spec, layers=spec.layers + 1))

    monkeypatch.setattr(mobilevlm_family, "ClipTower", whole)
    got = Eager(this.checkpoint).encode(tile).numpy()
    assert worst(got, this.oracle.encode(tile)) > 100 * TOLERANCE


@pytest.mark.parametrize("mutation", ["the class token stays", "groups are 3 x 3 blocks"])
def test_a_graph_that_is_not_the_reference_leaves_nothing_behind(
    made: Callable[[str], Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutation: str
) -> None:
    name, layer, wrong = MUTATIONS[mutation]

    def mistaken(component: Component) -> ExportedProgram:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layer, "forward", wrong)
            return trace(component)

    monkeypatch.setattr("lorgnette.export.trace.trace", mistaken)
    with pytest.raises(VerifyError, match="rung 'image_tokens' failed"):
        export(made(name).checkpoint, tmp_path / "b.lorg", Recipe(quant="int4-fast"))
    assert list(tmp_path.iterdir()) == []


# Recorded tensors

TEXT = GoldenText(
    question="?",
    tiles_sha256="",
    rows=0,
    cols=0,
    prompt_ids=(1,),
    original_greedy_ids=(2,),
    rounding_image_tokens=0.0,
    rounding_logits=0.0,
    rounding_activations=0.0,
)


def test_views_that_are_not_in_order_are_recorded_as_they_read(tmp_path: Path) -> None:
    """Image tokens of MobileVLM are such a view; safetensors writes memory as it lies."""
    draw = np.random.default_rng(0)
    image_tokens = draw.standard_normal((1, 8, 6), np.float32).transpose(0, 2, 1)
    logits = np.asfortranarray(draw.standard_normal((4, 10), np.float32))
    source = picture(5, 7)[::-1, :, ::-1]
    assert not any(array.flags.c_contiguous for array in (image_tokens, logits, source))
    write_golden(Golden(TEXT, source, image_tokens, logits), tmp_path / "golden")
    found = load_file(tmp_path / "golden" / "golden.safetensors")
    for name, wanted in (("image_tokens", image_tokens), ("logits", logits), ("picture", source)):
        np.testing.assert_array_equal(found[name], wanted)


# The oldest engine

CLIMB = """
import sys
import onnxruntime
from lorgnette.runtime.model import open_model
from lorgnette.runtime.verify import verify
for path in sys.argv[1:]:
    ladder = verify(open_model(path, threads=1))
    print(onnxruntime.__version__, len(ladder.rungs), ladder.passed)
"""


@pytest.mark.parametrize("name", ["mobilevlm-v2", "omnivlm"])
def test_the_oldest_engine_climbs_the_ladder(
    made: Callable[[str], Made], ort_floor_env: dict[str, str], name: str
) -> None:
    bundles = [str(made(name).bundle(scheme)) for scheme in ("fp32", "int8", "int4")]
    done = subprocess.run(
        [sys.executable, "-c", CLIMB, *bundles],
        env=ort_floor_env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["1.24.2 5 True"] * 3
