"""Wrong checkpoints of MobileVLM and OmniVLM: one line on stderr, exit 2, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import make_mobilevlm as mobilevlm
from tests import make_omnivlm as omnivlm
from tests.gguf_files import edit_gguf
from tests.make_mobilevlm import TINY_CLIP, make_mobilevlm
from tests.make_omnivlm import make_omnivlm
from tests.unit.bad_input import DECODER, TOWER, cut, edit_json, refused
from tests.unit.cli_helpers import call

# Weights of MobileVLM


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


def test_pickled_code_is_refused_and_not_run(
    tmp_path: Path, copy_of: Callable[[str], Path]
) -> None:
    folder, marker = copy_of("mobilevlm"), tmp_path / "was run"
    file = folder / "pytorch_model.bin"
    weights = torch.load(file, weights_only=True)
    torch.save(weights | {"model.norm.weight": Payload(marker)}, file)
    refused(tmp_path, folder, words=("pickled code", "mkdir", str(file), "nothing of it was run"))
    result = call("inspect", folder)
    assert (result.exit_code, result.stdout) == (2, "")
    assert not marker.exists()
    torch.load(file, weights_only=False)  # it would have run
    assert marker.exists()


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99, -1])
def test_a_cut_off_bin(tmp_path: Path, copy_of: Callable[[str], Path], keep: float) -> None:
    folder = copy_of("mobilevlm")
    cut(folder / "pytorch_model.bin", keep)
    refused(tmp_path, folder, words=("pytorch_model.bin",))


def test_a_damaged_bin(tmp_path: Path, copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("mobilevlm")
    file = folder / "pytorch_model.bin"
    data = bytearray(file.read_bytes())
    at = data.index(b"data.pkl") + 40
    data[at : at + 20] = bytes(20)
    file.write_bytes(data)
    refused(tmp_path, folder, words=("pytorch_model.bin", "download it again"))


def test_values_that_are_not_finite(tmp_path: Path, copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("mobilevlm")
    file, name = folder / "pytorch_model.bin", "model.mm_projector.peg.peg.0.bias"
    weights = torch.load(file, weights_only=True)
    weights[name][3] = torch.nan
    torch.save(weights, file)
    refused(tmp_path, folder, words=(name, "not finite"))


PROJECTOR = "model.mm_projector.mlp.mlp.2.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop(PROJECTOR), (f"tensor '{PROJECTOR}' is missing",)),
        (
            lambda w: w.update({PROJECTOR: torch.ones(64, 32)}),
            (f"tensor '{PROJECTOR}' has the wrong shape", "got [64, 32], wanted [64, 64]"),
        ),
        (
            lambda w: w.update({"model.mm_projector.extra": torch.ones(2)}),
            ("1 unknown tensor(s), first 'model.mm_projector.extra'",),
        ),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(64, dtype=torch.int64)}),
            ("tensor 'model.norm.weight' is not a float tensor", "got I64"),
        ),
    ],
    ids=["missing", "wrong shape", "unknown", "integers"],
)
def test_tensors_that_are_not_the_models(
    tmp_path: Path,
    copy_of: Callable[[str], Path],
    change: Callable[[dict[str, Any]], object],
    words: tuple[str, ...],
) -> None:
    folder = copy_of("mobilevlm")
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    change(weights)
    torch.save(weights, folder / "pytorch_model.bin")
    refused(tmp_path, folder, words=words)


def test_a_projector_of_the_other_version(tmp_path: Path, copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("mobilevlm")
    edit_json(folder / "config.json", mm_projector_type="ldpnet")
    refused(tmp_path, folder, words=("model.mm_projector.model.mlp.1.weight", "is missing"))


# Tokenizers and the tokens that end an answer


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, -20])
def test_a_cut_off_tokenizer_model(
    tmp_path: Path, copy_of: Callable[[str], Path], keep: float
) -> None:
    folder = copy_of("mobilevlm")
    cut(folder / "tokenizer.model", keep)
    refused(tmp_path, folder, words=("tokenizer.model",))


def test_a_tokenizer_model_that_is_something_else(
    tmp_path: Path, copy_of: Callable[[str], Path]
) -> None:
    folder = copy_of("mobilevlm")
    (folder / "tokenizer.model").write_bytes(bytes(range(256)) * 9)
    refused(tmp_path, folder, words=("not a sentencepiece model", "tokenizer.model"))


@pytest.mark.parametrize(
    ("name", "file"), [("mobilevlm", "tokenizer.model"), ("omnivlm", "tokenizer.json")]
)
def test_no_tokenizer(tmp_path: Path, copy_of: Callable[[str], Path], name: str, file: str) -> None:
    folder = copy_of(name)
    (folder / file).unlink()
    refused(tmp_path, folder, words=("file is missing", "tokenizer.json", "tokenizer.model"))


def test_a_vocabulary_larger_than_the_model(tmp_path: Path, copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("mobilevlm")
    config = mobilevlm.tiny_config(vocab_size=384)
    shutil.rmtree(folder)
    make_mobilevlm(folder, config)
    refused(tmp_path, folder, words=("the tokenizer has more tokens than the model", "<= 384"))


def test_a_vocabulary_without_the_image_token(
    tmp_path: Path, copy_of: Callable[[str], Path]
) -> None:
    folder = copy_of("omnivlm")
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("<|image_pad|>", "<|another|>"))
    refused(tmp_path, folder, words=("<|image_pad|>", "tokenizer"))
    pair = copy_of("pair")
    tokens = omnivlm.qwen2_tokenizer().get_vocab(with_added_tokens=True)
    names = {i: token for token, i in tokens.items()}
    texts = [names.get(i, f"[PAD{i}]").replace("image_pad", "another") for i in range(448)]
    edit_gguf(pair / DECODER, {"tokenizer.ggml.tokens": texts})
    refused(tmp_path, pair, words=("lacks a token", "<|image_pad|>", DECODER))


@pytest.mark.parametrize("token_id", [None, 448, -1, 10**9, "2", True, [2, 10**9]])
@pytest.mark.parametrize("name", ["mobilevlm", "omnivlm"])
def test_an_answer_that_would_not_end(
    tmp_path: Path, copy_of: Callable[[str], Path], name: str, token_id: object
) -> None:
    folder = copy_of(name)
    config = json.loads((folder / "config.json").read_text())
    config.pop("eos_token_id", None)
    config.get("text_config", {}).pop("eos_token_id", None)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text("{}")
    edit_json(folder / "generation_config.json", eos_token_id=token_id)
    refused(tmp_path, folder, words=("eos_token_id",))


@pytest.mark.parametrize("token_id", [None, 448, -1, 2**63, "2", True])
def test_a_gguf_answer_that_would_not_end(
    tmp_path: Path, copy_of: Callable[[str], Path], token_id: object
) -> None:
    pair = copy_of("pair")
    edit_gguf(pair / DECODER, {"tokenizer.ggml.eos_token_id": token_id})
    line = refused(tmp_path, pair, words=("eos_token_id", DECODER))
    assert f".gguf{os.sep}" not in line


@pytest.mark.parametrize("key", ["tokens", "token_type", "merges", "model", "pre"])
def test_a_gguf_tokenizer_with_a_part_missing(
    tmp_path: Path, copy_of: Callable[[str], Path], key: str
) -> None:
    pair = copy_of("pair")
    edit_gguf(pair / DECODER, {f"tokenizer.ggml.{key}": None})
    refused(tmp_path, pair, words=(DECODER,))


# A vision tower apart


def test_a_tower_apart_that_is_no_clip(tmp_path: Path, copy_of: Callable[[str], Path]) -> None:
    folder, other, pair = copy_of("mobilevlm"), copy_of("omnivlm"), copy_of("pair")
    words = ("the vision tower is not CLIP's", "clip_vision_model")
    refused(tmp_path, folder, "--vision", other, words=(*words, "'omnivlm'"))
    refused(tmp_path, folder, "--vision", pair / TOWER, words=words)
    refused(tmp_path, folder, "--vision", tmp_path / "none", words=("none",))
    (tmp_path / "empty").mkdir()
    refused(tmp_path, folder, "--vision", tmp_path / "empty", words=("config.json",))
    refused(tmp_path, other, "--vision", folder / "vision_tower", words=("vision_tower",))
    refused(tmp_path, pair / DECODER, "--vision", other, words=("vision tower", "siglip"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 32}, ("mm_hidden_size is not the width", "got 64")),
        ({"image_size": 54}, ("patch grid is odd", "got 9")),
        ({"num_hidden_layers": 1}, ("one layer", "2 or more")),
        ({"hidden_act": "gelu"}, ("hidden_act", "quick_gelu")),
    ],
    ids=str,
)
def test_a_clip_of_another_size(
    tmp_path: Path,
    copy_of: Callable[[str], Path],
    changes: dict[str, object],
    words: tuple[str, ...],
) -> None:
    folder, clip = copy_of("mobilevlm"), tmp_path / "clip"
    config = mobilevlm.tiny_config()
    make_mobilevlm(tmp_path / "made", config, TINY_CLIP | changes, tower_apart=clip)
    refused(tmp_path, folder, "--vision", clip, words=words)


def test_a_clip_whose_weights_are_of_another_size(
    tmp_path: Path, copy_of: Callable[[str], Path]
) -> None:
    folder, clip = copy_of("mobilevlm"), tmp_path / "clip"
    make_mobilevlm(tmp_path / "made", mobilevlm.tiny_config(), tower_apart=clip)
    edit_json(clip / "config.json", image_size=60)
    edit_json(clip / "preprocessor_config.json", size=60, crop_size=60)
    words = ("position_embedding.weight", "got [65, 64], wanted [101, 64]")
    refused(tmp_path, folder, "--vision", clip, words=words)


@pytest.mark.parametrize("name", ["x" * 1000, "../elsewhere", "/etc", "none", "", "a\0b"])
def test_a_tower_named_by_a_path_that_leaves_the_checkpoint(
    tmp_path: Path, copy_of: Callable[[str], Path], name: str
) -> None:
    folder = copy_of("mobilevlm")
    edit_json(folder / "config.json", mm_vision_tower=name)
    refused(tmp_path, folder, words=("the vision tower is not known", "--vision DIR"))


# What is asked for


@pytest.mark.parametrize(
    "args",
    [("--max-tiles", 4), ("--longest-edge", 96), ("--split",), ("--set", "max_tiles=2")],
    ids=str,
)
@pytest.mark.parametrize("name", ["mobilevlm", "pair"])
def test_tiles_of_a_family_that_has_none(
    tmp_path: Path, originals: Path, name: str, args: tuple[object, ...]
) -> None:
    words = ("has no meaning for this family", "one tile of")
    refused(tmp_path, originals / name, *args, words=words)


@pytest.mark.parametrize(("name", "tokens"), [("mobilevlm", 144), ("omnivlm", 729)])
def test_a_context_too_small_for_the_picture_says_what_would_fit(
    tmp_path: Path, name: str, tokens: int
) -> None:
    if name == "mobilevlm":
        clip = TINY_CLIP | {"patch_size": 2}
        checkpoint = make_mobilevlm(tmp_path / "m", mobilevlm.tiny_config(), clip)
    else:
        config = omnivlm.tiny_config(1, max_position_embeddings=1024)
        config["vision_config"] |= {"image_size": 54, "patch_size": 2}
        config["text_config"] |= {"max_position_embeddings": 1024}
        del config["max_position_embeddings"]
        checkpoint = make_omnivlm(tmp_path / "m", config)
    line = refused(tmp_path, checkpoint, "--context", tokens, words=("too small", "--context"))
    assert "--max-tiles" not in line
    least = int(line.partition("wanted ")[2].split()[0])
    assert tokens < least < tokens + 150
    refused(tmp_path, checkpoint, "--context", least - 1, words=(f"wanted {least} or more",))
    out = tmp_path / "out" / "a.lorg"
    assert call("export", checkpoint, "--out", out, "--context", least).exit_code == 0
    refused(tmp_path / "m", checkpoint, "--context", 99999, words=("out of range", "2 to"))
