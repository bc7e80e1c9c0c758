"""The parity ladder: fresh bundles climb it, and each rung breaks for its own reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import safetensors.numpy

from lorgnette.errors import BundleError, VerifyError
from lorgnette.runtime.golden import read_golden
from lorgnette.runtime.model import open_model
from lorgnette.runtime.verify import Ladder, Rung, relative_error, verify
from tests.runtime.conftest import SCHEMES
from tests.runtime.support import Json, copy_bundle, edit_json, edit_manifest, redigest

RUNGS = ["pixels", "prompt_ids", "image_tokens", "logits", "greedy_ids"]


def climb(bundle: Path) -> Ladder:
    return verify(open_model(redigest(bundle), threads=1))


def assert_falls(ladder: Ladder, rung: str, detail: str) -> None:
    """The rung fails with this detail, those below hold, and those above were not climbed."""
    names = [r.name for r in ladder.rungs]
    assert names == RUNGS[: RUNGS.index(rung) + 1]
    assert [r.passed for r in ladder.rungs] == [True] * (len(names) - 1) + [False]
    assert detail in ladder.rungs[-1].detail
    assert not ladder.passed
    with pytest.raises(VerifyError, match=f"rung '{rung}' failed in here: got .*{detail}"):
        ladder.require("here")


@pytest.fixture
def broken(fp32: Path, tmp_path: Path) -> Path:
    """A copy of the float32 bundle to break."""
    return copy_bundle(fp32, tmp_path / "broken.lorg")


def edit_text(bundle: Path, change: Callable[[Json], None]) -> None:
    edit_json(bundle / "golden/golden.json", change)


def edit_tensors(bundle: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    path = bundle / "golden/golden.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def edit_weight(
    bundle: Path,
    graph: str,
    tensor: str,
    change: Callable[[np.ndarray], None],
    dtype: type[np.floating] = np.float32,
) -> None:
    """Changes a tensor of floats inside weights.bin."""
    model = onnx.load(bundle / f"graphs/{graph}.onnx", load_external_data=False)
    found = [t for t in model.graph.initializer if t.name.startswith(tensor)]
    place = {entry.key: entry.value for entry in found[0].external_data}
    path = bundle / "graphs" / place["location"]
    data = bytearray(path.read_bytes())
    start, length = int(place["offset"]), int(place["length"])
    values = np.frombuffer(bytes(data[start : start + length]), dtype).copy()
    change(values)
    data[start : start + length] = values.tobytes()
    path.write_bytes(data)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fresh_bundles_climb_to_the_top(bundle_of: Callable[[str], Path], scheme: str) -> None:
    model = open_model(bundle_of(scheme), threads=1)
    ladder = verify(model)
    assert ladder.passed
    assert [rung.name for rung in ladder.rungs] == RUNGS
    ladder.require("here")
    for rung in ladder.rungs[2:4]:
        assert rung.error is not None
        assert rung.bound is not None
        assert 0 <= rung.error <= rung.bound
    assert "3 tiles bit-equal" in ladder.rungs[0].detail
    greedy = len(read_golden(model.bundle).text.original_greedy_ids)
    assert str(greedy) in ladder.rungs[4].detail
    assert ("not required" in ladder.rungs[4].detail) == (scheme != "fp32")


def test_what_rounding_costs_is_on_record_and_in_order(
    bundle_of: Callable[[str], Path],
) -> None:
    texts = {s: read_golden(open_model(bundle_of(s)).bundle).text for s in SCHEMES}
    costs = [texts[scheme].rounding_logits for scheme in SCHEMES]
    assert costs[0] == 0
    assert costs == sorted(costs)
    assert 0 < costs[2] < costs[3] < 0.5
    # Both have vision in 8 bits.
    for scheme in ("int8", "int4"):
        assert 0 < texts[scheme].rounding_image_tokens < 0.02
    # The original's answer is the original's, whatever the scheme.
    assert len({text.original_greedy_ids for text in texts.values()}) == 1


def test_verifying_leaves_no_trace_in_the_model(fp32: Path) -> None:
    model = open_model(fp32, threads=1)
    assert verify(model) == verify(model)


# pixels


def test_other_pixels_fall_at_the_first_rung(broken: Path) -> None:
    edit_text(broken, lambda text: text.update(tiles_sha256="0" * 64))
    assert_falls(climb(broken), "pixels", "3 tiles differ")


def test_one_other_pixel_of_the_picture_is_seen(broken: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["picture"] = tensors["picture"].copy()
        tensors["picture"][10, 50, 1] ^= 128

    edit_tensors(broken, change)
    assert_falls(climb(broken), "pixels", "differ")


@pytest.mark.parametrize("filter_name", ["bicubic", "bilinear"])
def test_another_filter_is_seen(broken: Path, filter_name: str) -> None:
    edit_manifest(broken, lambda m: m["preprocess"].update(resample=filter_name))
    assert_falls(climb(broken), "pixels", "3 tiles differ")


@pytest.mark.parametrize("change", [{"split": False}, {"longest_edge": 64}], ids=str)
def test_another_grid_is_seen(broken: Path, change: Json) -> None:
    edit_manifest(broken, lambda m: m["preprocess"].update(change))
    assert_falls(climb(broken), "pixels", "grid 0x0, wanted 1x2")


# prompt_ids


def change_prompt(manifest: Json, where: str, text: str) -> None:
    parts = where.split(".")
    found = manifest["prompt"]
    for part in parts[:-1]:
        found = found[part]
    assert found[parts[-1]] != text
    found[parts[-1]] = text


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("prefix", ""),
        ("generation", "Assistant: "),
        ("turns.user.header_image_first", "User: "),
        ("turns.user.footer", "<end_of_utterance>"),
        ("image.row_end", "\n\n"),
        ("image.thumbnail", "<fake_token_around_image><global-img>{image}"),
        ("image.tile", "<row_{row}_col_{col}>{image}"),
        ("image.tile", "<fake_token_around_image><row_{col}_col_{row}>{image}"),
    ],
)
def test_another_prompt_is_seen(broken: Path, where: str, text: str) -> None:
    edit_manifest(broken, lambda m: change_prompt(m, where, text))
    assert_falls(climb(broken), "prompt_ids", "differ from position")


def test_another_tokenizer_is_seen(broken: Path) -> None:
    def change(values: Json) -> None:
        ids = values["model"]["vocab"]
        ids["e"], ids["a"] = ids["a"], ids["e"]
        values["model"]["merges"] = []

    edit_json(broken / "tokenizer/tokenizer.json", change)
    assert_falls(climb(broken), "prompt_ids", "differ from position")


def test_a_prompt_that_is_only_longer_is_seen(broken: Path) -> None:
    edit_text(broken, lambda text: text["prompt_ids"].append(5))
    ids = json.loads((broken / "golden/golden.json").read_text())["prompt_ids"]
    assert_falls(climb(broken), "prompt_ids", f"differ from position {len(ids) - 1}")


# image_tokens


def scale(factor: float) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values *= np.float32(factor)

    return change


@pytest.mark.parametrize(
    "tensor",
    [
        "projector.projection.weight",
        "tower.layers.0.attention.",
        "tower.layers.1.mlp.fc2.bias",
        "tower.embed.position",
        "tower.embed.std",
    ],
)
def test_other_vision_weights_are_seen(broken: Path, tensor: str) -> None:
    edit_weight(broken, "vision_encoder", tensor, scale(1.2))
    assert_falls(climb(broken), "image_tokens", "relative error")


def test_one_tile_is_enough_to_fall(broken: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["image_tokens"] = tensors["image_tokens"].copy()
        tensors["image_tokens"][1] *= np.float32(1.01)

    edit_tensors(broken, change)
    assert_falls(climb(broken), "image_tokens", "at tile 1 of 3")


def test_numbers_that_are_none_fall(broken: Path) -> None:
    edit_weight(broken, "vision_encoder", "projector.projection.weight", scale(float("nan")))
    assert_falls(climb(broken), "image_tokens", "relative error inf")


# logits


@pytest.mark.parametrize(
    "tensor",
    ["head.weight", "layers.0.attention.", "layers.1.mlp.down_proj.weight", "norm."],
)
def test_other_decoder_weights_are_seen(broken: Path, tensor: str) -> None:
    edit_weight(broken, "decoder", tensor, scale(1.2))
    assert_falls(climb(broken), "logits", "relative error")


def test_the_logits_of_every_step_count(broken: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["logits"] = tensors["logits"].copy()
        tensors["logits"][-1] *= np.float32(1.01)

    edit_tensors(broken, change)
    steps = len(safetensors.numpy.load_file(broken / "golden/golden.safetensors")["logits"])
    assert steps > 1, "no step behind the prompt is kept: the KV cache is not tested"
    assert_falls(climb(broken), "logits", f"at step {steps - 1} of {steps}")


def test_another_embedding_is_seen(broken: Path) -> None:
    edit_weight(broken, "token_embedding", "table.weight", lambda values: values[::7].fill(0))
    assert_falls(climb(broken), "logits", "relative error")


def test_other_rotary_tables_are_seen(broken: Path) -> None:
    edit_weight(broken, "decoder", "cos", lambda values: values.fill(1))
    assert_falls(climb(broken), "logits", "relative error")


def test_the_weights_of_an_integer_scheme_are_seen(
    bundle_of: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = copy_bundle(bundle_of("int4"), tmp_path / "b.lorg")
    edit_weight(bundle, "decoder", "head.weight.int4g32h.scales", scale(1.5), np.float16)
    assert_falls(climb(bundle), "logits", "relative error")


def test_rounding_noise_is_let_through(broken: Path) -> None:
    edit_weight(broken, "decoder", "head.weight", scale(1 + 1e-6))
    assert climb(broken).passed


# greedy_ids


def other_greedy(text: Json) -> None:
    text["original_greedy_ids"][-1] ^= 1


def test_another_answer_is_seen(broken: Path) -> None:
    edit_text(broken, other_greedy)
    last = len(json.loads((broken / "golden/golden.json").read_text())["original_greedy_ids"]) - 1
    assert_falls(climb(broken), "greedy_ids", f"differ from the original's at {last} of {last + 1}")


def test_another_answer_is_only_told_where_rounding_may_change_it(
    bundle_of: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = copy_bundle(bundle_of("int8"), tmp_path / "b.lorg")
    edit_text(bundle, other_greedy)
    ladder = climb(bundle)
    assert ladder.passed
    assert "differ from the original's at" in ladder.rungs[-1].detail
    assert "(reported, not required of this scheme)" in ladder.rungs[-1].detail


def test_an_empty_answer_is_no_proof(broken: Path) -> None:
    edit_text(broken, lambda text: text.update(original_greedy_ids=[]))
    with pytest.raises(BundleError, match="golden logits do not fit the golden answer"):
        climb(broken)


# golden data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(picture=t["picture"].astype(np.float32)), "'picture' does not fit"),
        (lambda t: t.update(picture=t["picture"][0]), "'picture' does not fit"),
        (lambda t: t.update(picture=t["picture"][:, :, :1].copy()), "'picture' does not fit"),
        (lambda t: t.update(image_tokens=t["image_tokens"][:2].copy()), "'image_tokens' does"),
        (lambda t: t.update(image_tokens=t["image_tokens"][0]), "'image_tokens' does not fit"),
        (lambda t: t.update(logits=t["logits"][:, :-1].copy()), "'logits' does not fit"),
        (lambda t: t.update(logits=t["logits"][0]), "'logits' does not fit"),
        (lambda t: t.update(logits=t["logits"][:0].copy()), "golden logits do not fit"),
        (lambda t: t.update(logits=np.repeat(t["logits"], 9, axis=0)), "golden logits do not"),
        (lambda t: t.pop("logits"), "golden data is damaged"),
    ],
)
def test_golden_tensors_must_fit(
    broken: Path, change: Callable[[dict[str, np.ndarray]], None], message: str
) -> None:
    edit_tensors(broken, change)
    with pytest.raises(BundleError, match=message):
        climb(broken)


@pytest.mark.parametrize("name", ["golden.json", "golden.safetensors"])
def test_damaged_golden_data_is_told(broken: Path, name: str) -> None:
    (broken / "golden" / name).write_bytes(b"{ no")
    with pytest.raises(BundleError, match="golden data is damaged"):
        climb(broken)


def test_golden_data_that_overflows_the_cache_is_told(broken: Path) -> None:
    context = json.loads((broken / "manifest.json").read_text())["context_length"]
    edit_text(broken, lambda text: text.update(original_greedy_ids=[5] * context))
    with pytest.raises(BundleError, match="does not fit the context"):
        climb(broken)


def test_missing_golden_data_is_told(broken: Path) -> None:
    edit_manifest(broken, lambda m: m["golden"].update(folder="elsewhere"))
    with pytest.raises(BundleError, match="is not part of the bundle"):
        climb(broken)


def test_another_golden_can_be_handed_over(fp32: Path) -> None:
    model = open_model(fp32, threads=1)
    golden = read_golden(model.bundle)
    other = msgspec.structs.replace(golden.text, question="How many?")
    assert_falls(
        verify(model, type(golden)(other, golden.picture, golden.image_tokens, golden.logits)),
        "prompt_ids",
        "differ from position",
    )


# the measure


def test_relative_error_is_the_norms() -> None:
    wanted = np.array([3, 4], np.float32)
    assert relative_error(wanted, wanted) == 0
    assert relative_error(np.array([3, 5], np.float32), wanted) == pytest.approx(0.2)
    assert relative_error(wanted * np.float32("inf"), wanted) == float("inf")
    assert relative_error(wanted[:1], wanted) == float("inf")
    assert relative_error(np.zeros(2, np.float32), np.zeros(2, np.float32)) == 0
    assert relative_error(wanted, np.zeros(2, np.float32)) > 1e6


def test_a_ladder_that_holds_requires_nothing() -> None:
    Ladder((Rung("pixels", True, ""),)).require("here")
