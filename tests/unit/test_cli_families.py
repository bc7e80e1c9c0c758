"""Every command on MobileVLM and OmniVLM, checkpoints in each of their published forms."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from PIL import Image

from lorgnette.quantize.plan import PLANS
from lorgnette.targets.onnx.weight_file import PAGE_BYTES
from tests import make_mobilevlm as mobilevlm
from tests import make_omnivlm as omnivlm
from tests.family_cases import CASES, Made, OmniVlm, picture
from tests.make_mobilevlm import CLIP_L_336, TINY_CLIP, make_mobilevlm
from tests.make_omnivlm import make_gguf_pair
from tests.unit.cli_helpers import call, document, process

QUESTION = "Where is it?"
RUNGS = ["pixels", "prompt_ids", "image_tokens", "logits", "greedy_ids"]
DECODER = "llm-F16.gguf"
TOWER = "mmproj-f16.gguf"


@pytest.fixture(scope="module")
def mobile(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """MobileVLM V2."""
    return Made(CASES["mobilevlm-v2"], tmp_path_factory.mktemp("mobilevlm"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """OmniVLM as two GGUF files in one folder."""
    return Made(OmniVlm(kind="F16"), tmp_path_factory.mktemp("omnivlm"))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture as a file."""
    path = tmp_path_factory.mktemp("pictures") / "wide.png"
    Image.fromarray(picture(70, 40)).save(path)
    return path


def apart(source: Path, folder: Path) -> tuple[Path, Path]:
    """The two files of a pair in folders of their own."""
    places = folder / "text" / DECODER, folder / "vision" / "tower.gguf"
    for name, place in zip((DECODER, TOWER), places, strict=True):
        place.parent.mkdir()
        shutil.copy(source / name, place)
    return places


def manifest(bundle: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    return values


# list


def test_all_three_families_are_listed() -> None:
    families = {entry["name"]: entry for entry in document("list", "families")["families"]}
    assert set(families) == {"mobilevlm", "omnivlm", "smolvlm"}
    assert families["mobilevlm"]["model_types"] == ["mobilevlm"]
    assert families["omnivlm"]["model_types"] == ["omnivlm"]
    lines = call("list", "families").stdout.splitlines()
    assert [line.split()[0] for line in lines] == sorted(families)


# export


def digests(bundle: Path) -> list[tuple[str, str]]:
    return [(entry["path"], entry["sha256"]) for entry in manifest(bundle)["files"]]


def test_a_gguf_pair_is_found_by_folder_by_file_and_by_two_files(
    pair: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a bundle that is given no name has that of the checkpoint."""
    monkeypatch.chdir(tmp_path)
    decoder, tower = apart(pair.checkpoint, tmp_path)
    by_file = document("export", pair.checkpoint / DECODER)
    assert by_file["bundle"] == "llm-F16-fp32.lorg"
    by_two = document("export", decoder, "--vision", tower, "--out", "two.lorg")
    for told in (by_file, by_two):
        assert [rung["name"] for rung in told["ladder"]] == RUNGS
        assert all(rung["passed"] for rung in told["ladder"])
        assert digests(tmp_path / told["bundle"]) == digests(pair.bundle("fp32"))
        made = manifest(tmp_path / told["bundle"])
        assert (made["spec"]["family"], made["checkpoint"]) == ("omnivlm", DECODER)


def test_as_a_process_it_is_silent_on_stderr_and_tells_which_kernels_stay_float(
    mobile: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Random weights keep no promise: that is told, and accepted.
    asked = ("--quant", "int4-fast", "--measure", 2)
    refused = call("export", mobile.checkpoint, *asked)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "--accept-loss" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    code, out, err = process("export", mobile.checkpoint, *asked, "--accept-loss")
    assert (code, err) == (0, b"")
    lines = out.decode().splitlines()
    assert lines[0].startswith("checkpoint-int4-fast.lorg: ")
    for rung in RUNGS:
        assert any(line.split()[:2] == [rung, "ok"] for line in lines)
    told = [line for line in lines if "stayed float" in line]
    assert len(told) == 1
    assert "vision_encoder: 'projector.depthwise.weight'" in told[0]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-int4-fast.lorg"]


# inspect


FORMS = ["mobilevlm-v1", "mobilevlm-v2", "omnivlm", "nano-vlm-instruct", "omnivlm-gguf-Q8_0"]


@pytest.mark.parametrize("name", FORMS)
def test_a_checkpoint_in_numbers(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    checkpoint = case.make(tmp_path / "checkpoint")
    told = document("inspect", checkpoint)
    mobile = name.startswith("mobilevlm")
    assert told["kind"] == "checkpoint"
    assert told["family"] == ("mobilevlm" if mobile else "omnivlm")
    assert told["variant"] == {"mobilevlm-v1": "v1 custom", "mobilevlm-v2": "V2 custom"}.get(
        name, "custom"
    )
    tokens = {"nano-vlm-instruct": 81, "mobilevlm-v1": 16, "mobilevlm-v2": 16}.get(name, 9)
    for entry in told["pictures"]:
        assert (entry["tiles"], entry["image_tokens"]) == (1, tokens)
    if mobile:
        shapes = mobilevlm.published_shapes(case.config, TINY_CLIP)
    else:
        shapes = omnivlm.published_shapes(case.config)
    assert told["parameters"] == counted(shapes, layers=TINY_CLIP["num_hidden_layers"])


def counted(shapes: Mapping[str, tuple[int, ...]], layers: int) -> dict[str, int]:
    """Parameters by component, from names and shapes alone; `layers` of CLIP, one unused."""
    counts = dict.fromkeys(("vision_encoder", "token_embedding", "decoder"), 0)
    head = any("lm_head" in name for name in shapes)
    for name, shape in shapes.items():
        size = math.prod(shape)
        if "vision_tower" in name:
            unused = (".head.", f"{mobilevlm.TOWER}vision_model.post", f".layers.{layers - 1}.")
            in_clip = name.startswith(mobilevlm.TOWER)
            if not any(part in name for part in (unused if in_clip else unused[:1])):
                counts["vision_encoder"] += size
        elif "projector" in name:
            counts["vision_encoder"] += size
        elif "embed_tokens" in name:
            counts["token_embedding"] += size
            counts["decoder"] += 0 if head else size
        else:
            counts["decoder"] += size
    shared = 0 if head else counts["token_embedding"]
    return {**counts, "total": sum(counts.values()) - shared}


@pytest.mark.parametrize(
    "scheme",
    [
        "fp32",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("fp16", "int8", "int4-fast")),
        "int4",
    ],
)
@pytest.mark.parametrize("name", ["mobile", "pair"])
def test_predicted_weights_are_the_real_ones(
    request: pytest.FixtureRequest, name: str, scheme: str
) -> None:
    made: Made = request.getfixturevalue(name)
    told = document("inspect", made.checkpoint)
    assert list(told["predicted_weight_bytes"]) == list(PLANS)
    real = (made.bundle(scheme) / "graphs" / "weights.bin").stat().st_size
    # Tensors of a page or more begin on one: another order, another filling in between.
    assert abs(told["predicted_weight_bytes"][scheme] - real) <= PAGE_BYTES
    bundle = document("inspect", made.bundle(scheme))
    for key in ("family", "model_type", "variant", "pictures", "kv_cache_bytes"):
        assert bundle[key] == told[key]
    assert bundle["quant"] == scheme


def test_lines_tell_family_variant_parameters_and_tokens(pair: Made) -> None:
    told = document("inspect", pair.checkpoint)
    lines = call("inspect", pair.checkpoint / DECODER).stdout
    assert "family omnivlm (omnivlm), custom" in lines
    assert f"{told['parameters']['total']:,}" in lines
    for name in ("vision_encoder", "token_embedding", "decoder"):
        assert f"{name} {told['parameters'][name]:,}" in lines
    assert "1:1: 1 tile, 9 image tokens" in lines
    assert told["dtypes"]["F16"] > 0
    for scheme in PLANS:
        assert f"\n  {scheme} " in lines


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Checkpoints of published sizes that hold no weights: headers, and files with holes."""
    folder = tmp_path_factory.mktemp("published")
    yield {"omnivlm": hollow_pair(folder / "omni"), "mobilevlm": hollow_folder(folder / "mobile")}
    shutil.rmtree(folder)


def hollow_pair(folder: Path) -> Path:
    config = json.loads((omnivlm.CONFIGS / "OmniVLM-968M.json").read_text())
    small = omnivlm.tiny_config()["text_config"]
    text = config["text_config"] | {k: small[k] for k in ("eos_token_id", "bos_token_id")}
    folder.mkdir()
    decoder = gguf.GGUFWriter(folder / DECODER, "qwen2")
    tower = gguf.GGUFWriter(folder / TOWER, "siglip")
    omnivlm._add_text_keys(decoder, text)
    omnivlm._add_tokens(decoder, omnivlm.qwen2_tokenizer(), text)
    omnivlm._add_vision_keys(tower, config)
    ends = {decoder: 0, tower: 0}
    for name, shape in omnivlm.published_shapes(config).items():
        of_tower = name.startswith((omnivlm.TOWER, omnivlm.PROJECTOR))
        writer, size = tower if of_tower else decoder, 2 * math.prod(shape)
        writer.add_tensor_info(omnivlm.gguf_name(name), shape, np.dtype(np.float16), size)
        ends[writer] += size + 32
    for file, (writer, end) in zip((DECODER, TOWER), ends.items(), strict=True):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with (folder / file).open("r+b") as opened:
            opened.truncate((folder / file).stat().st_size + end)
    return folder


def hollow_folder(folder: Path) -> Path:
    config = json.loads((mobilevlm.CONFIGS / "MobileVLM_V2-1.7B.json").read_text())
    folder.mkdir()
    mobilevlm.write_small_files(folder, config)
    header, end = dict[str, object](), 0
    for name, shape in mobilevlm.published_shapes(config, CLIP_L_336).items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def test_published_sizes_are_told_before_a_weight_is_read(published: dict[str, Path]) -> None:
    omni = document("inspect", published["omnivlm"])
    assert (omni["family"], omni["variant"]) == ("omnivlm", "968M")
    assert {entry["image_tokens"] for entry in omni["pictures"]} == {81}
    # Source: the model's card adds up 494,032,768 of Qwen2.5-0.5B and 46,142,336 of the projector.
    assert omni["parameters"]["decoder"] == 494_032_768
    assert omni["parameters"]["token_embedding"] == 151_936 * 896
    assert omni["parameters"]["vision_encoder"] > 400_000_000 + 46_142_336
    mobile = document("inspect", published["mobilevlm"])
    assert (mobile["family"], mobile["variant"]) == ("mobilevlm", "V2 1.7B")
    assert {entry["image_tokens"] for entry in mobile["pictures"]} == {144}
    for told in (omni, mobile):
        weights, parameters = told["predicted_weight_bytes"], told["parameters"]["total"]
        assert weights["fp32"] == pytest.approx(4 * parameters, rel=0.01)
        assert weights["fp16"] == pytest.approx(2 * parameters, rel=0.01)
        # Vision by channel, the rest in groups of 32, each with a scale of two bytes.
        vision = told["parameters"]["vision_encoder"]
        rest = parameters - vision
        assert weights["int8"] == pytest.approx(vision + 1.0625 * rest, rel=0.01)
        assert weights["int4"] == pytest.approx(vision + 0.5625 * rest, rel=0.02)
        assert weights["int4-fast"] == weights["int4"]
        memory = told["predicted_memory_bytes"]
        assert all(memory[name] > weights[name] for name in PLANS)


# run


def oracle_answer(made: Made, count: int, ids: list[int] | None = None) -> list[int]:
    tile = made.case.tile(picture(70, 40))
    answer = made.oracle.greedy(ids or made.case.ids(QUESTION), tile, count)
    ends = [at + 1 for at, token in enumerate(answer) if token in made.case.stops]
    return answer[: min(ends, default=count)]


@pytest.mark.parametrize("name", ["mobile", "pair"])
def test_the_answer_is_the_oracles(request: pytest.FixtureRequest, image: Path, name: str) -> None:
    made: Made = request.getfixturevalue(name)
    asked = ("--image", image, "--prompt", QUESTION, "--max-new-tokens", 12)
    told = document("run", made.bundle("fp32"), *asked)
    assert told["token_ids"] == oracle_answer(made, 12)
    assert told["prompt_tokens"] == len(made.case.ids(QUESTION))
    assert (told["image_tokens"], told["tiles"]) == (16 if name == "mobile" else 9, 1)
    assert told["bundle"]["quant"] == "fp32"
    plain = call("run", made.bundle("fp32"), *asked)
    assert plain.exit_code == 0
    assert plain.stdout == told["text"] + "\n"
    words = call("run", made.bundle("fp32"), "--prompt", QUESTION, "--max-new-tokens", 3)
    assert words.exit_code == 0


def test_the_ocr_task_is_a_request_of_omnivlm_alone(mobile: Made, pair: Made, image: Path) -> None:
    asked = ("--image", image, "--task", "ocr", "--max-new-tokens", 12)
    told = document("run", pair.bundle("fp32"), *asked)
    text = (
        "<|im_start|>system\nYou are Nano-Omni-VLM, created by Nexa AI. You are a helpful "
        "assistant.<|im_end|>\n<|im_start|>user\n <|ocr_start|><|vision_start|>"
        + "<|image_pad|>" * 9
        + "<|vision_end|><|ocr_end|><|im_end|>"
    )
    ids = omnivlm.qwen2_tokenizer().encode(text, add_special_tokens=False).ids
    assert told["prompt_tokens"] == len(ids)
    assert told["token_ids"] == oracle_answer(pair, 12, ids)
    result = call("run", mobile.bundle("fp32"), *asked)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


# verify


@pytest.mark.parametrize("name", ["mobile", "pair"])
def test_a_good_bundle_climbs_to_the_top(
    request: pytest.FixtureRequest, image: Path, tmp_path: Path, name: str
) -> None:
    made: Made = request.getfixturevalue(name)
    told = document("verify", made.bundle("fp32"))
    assert [rung["name"] for rung in told["ladders"][0]["rungs"]] == RUNGS
    assert told["passed"]
    told = document("verify", made.bundle("fp32"), "--against", made.checkpoint, "--image", image)
    assert told["passed"]
    assert [ladder["picture"] for ladder in told["ladders"]] == [str(image)]


def test_verify_takes_a_pair_apart(pair: Made, tmp_path: Path) -> None:
    decoder, tower = apart(pair.checkpoint, tmp_path)
    bundle = pair.bundle("fp32")
    assert document("verify", bundle, "--against", decoder, "--vision", tower)["passed"]
    assert document("verify", bundle, "--against", pair.checkpoint / DECODER)["passed"]
    result = call("verify", bundle, "--vision", tower)
    assert result.exit_code == 2
    assert "--against" in result.stderr


def test_verify_against_other_weights_names_the_rung(pair: Made, tmp_path: Path) -> None:
    other = make_gguf_pair(tmp_path / "other", pair.case.config, kind="F16", seed=1)
    mixed = ("--against", pair.checkpoint / DECODER, "--vision", other[1])
    result = call("verify", pair.bundle("fp32"), *mixed)
    assert result.exit_code == 1
    assert "rung 'image_tokens' failed" in result.stderr
    mixed = ("--against", other[0], "--vision", pair.checkpoint / TOWER)
    result = call("verify", pair.bundle("fp32"), *mixed)
    assert result.exit_code == 1
    assert "rung 'logits' failed" in result.stderr


def test_verify_against_the_other_family_is_wrong_input(mobile: Made, pair: Made) -> None:
    result = call("verify", mobile.bundle("fp32"), "--against", pair.checkpoint)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "family omnivlm instead of mobilevlm" in result.stderr


def test_a_clip_folder_takes_the_place_of_the_tower(tmp_path: Path) -> None:
    clip = tmp_path / "clip"
    config = mobilevlm.tiny_config("ldpnet")
    own = make_mobilevlm(tmp_path / "own", config)
    make_mobilevlm(tmp_path / "other", config, seed=7, tower_apart=clip)
    out = tmp_path / "a.lorg"
    told = document("export", own, "--vision", clip, "--out", out)
    assert all(rung["passed"] for rung in told["ladder"])
    assert (
        document("inspect", own, "--vision", clip)["parameters"]
        == (document("inspect", own)["parameters"])
    )
    assert document("verify", out, "--against", own, "--vision", clip)["passed"]
    result = call("verify", out, "--against", own)
    assert result.exit_code == 1
    assert "rung 'image_tokens' failed" in result.stderr


def test_a_bundle_takes_no_vision_tower(pair: Made) -> None:
    result = call("inspect", pair.bundle("fp32"), "--vision", pair.checkpoint / TOWER)
    assert result.exit_code == 2
    assert "leave --vision out" in result.stderr
