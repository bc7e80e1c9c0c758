"""Wrong pairs of GGUF files: one line on stderr, exit 2, nothing left behind."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import make_omnivlm as omnivlm
from tests.gguf_files import Quantisation, edit_gguf, narrowed, renamed, requantised, without
from tests.make_omnivlm import make_gguf_pair
from tests.unit.bad_input import DECODER, TOWER, cut, refused

# GGUF files that are not a pair


def test_a_language_model_of_another_architecture(
    tmp_path: Path, copy_of: Callable[[str], Path]
) -> None:
    pair = copy_of("pair")
    edit_gguf(pair / DECODER, {"general.architecture": "llama"})
    words = (DECODER, "another architecture", "got 'llama'", "wanted 'qwen2'")
    refused(tmp_path, pair, words=words)


def test_a_vision_tower_of_another_architecture(
    tmp_path: Path, copy_of: Callable[[str], Path]
) -> None:
    pair = copy_of("pair")
    edit_gguf(pair / TOWER, {"general.architecture": "clip"})
    refused(tmp_path, pair, words=(TOWER, "vision tower", "'clip'", "siglip"))


def test_the_two_files_the_wrong_way_round(tmp_path: Path, copy_of: Callable[[str], Path]) -> None:
    pair = copy_of("pair")
    swapped = ("--vision", pair / DECODER)
    refused(tmp_path, pair / TOWER, *swapped, words=(DECODER, "'qwen2'", "siglip"))
    twice = ("--vision", pair / TOWER)
    refused(tmp_path, pair / TOWER, *twice, words=(TOWER, "'siglip'", "wanted 'qwen2'"))
    refused(tmp_path, pair / TOWER, words=(TOWER, "is a vision tower", "--vision"))


def test_files_that_have_each_others_names(tmp_path: Path, copy_of: Callable[[str], Path]) -> None:
    pair = copy_of("pair")
    (pair / DECODER).rename(pair / "other.gguf")
    (pair / TOWER).rename(pair / DECODER)
    (pair / "other.gguf").rename(pair / TOWER)
    refused(tmp_path, pair, words=(TOWER, "'qwen2'", "siglip"))


def test_a_tower_that_does_not_fit_names_the_dimension(
    tmp_path: Path, copy_of: Callable[[str], Path]
) -> None:
    pair = copy_of("pair")
    edit_gguf(pair / TOWER, tensor=narrowed("mm.2.weight"))
    refused(tmp_path, pair, words=(TOWER, "rows of mm.2.weight", "got 63, wanted 64", DECODER))
    pair = make_gguf_pair(tmp_path / "again", omnivlm.tiny_config(), kind="F16")[0].parent
    edit_gguf(pair / TOWER, {"siglip.vision.embedding_length": 50})
    refused(tmp_path, pair, words=(TOWER, "mm.0.weight", "a multiple of 50"))


@pytest.mark.parametrize("value", [None, False, 1])
def test_a_tower_without_omnivlms_projector(
    tmp_path: Path, copy_of: Callable[[str], Path], value: object
) -> None:
    pair = copy_of("pair")
    edit_gguf(pair / TOWER, {"siglip.has_omni_vlm_projector": value})
    refused(tmp_path, pair, words=(TOWER, "another projector", "has_omni_vlm_projector"))


@pytest.mark.parametrize("kind", [Quantisation.Q4_0, Quantisation.Q5_1])
@pytest.mark.parametrize(
    ("file", "tensor"), [(DECODER, "blk.1.ffn_down.weight"), (TOWER, "v.blk.0.ffn_up.weight")]
)
def test_a_quantisation_that_is_not_supported_is_named(
    tmp_path: Path, copy_of: Callable[[str], Path], file: str, tensor: str, kind: Quantisation
) -> None:
    pair = copy_of("pair")
    edit_gguf(pair / file, tensor=requantised(tensor, kind))
    refused(tmp_path, pair, words=(file, f"'{tensor}'", f"got {kind.name}", "Q8_0"))


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.02, 0.6, -1])
@pytest.mark.parametrize("file", [DECODER, TOWER])
def test_a_cut_off_gguf(
    tmp_path: Path, copy_of: Callable[[str], Path], file: str, keep: float
) -> None:
    pair = copy_of("pair")
    cut(pair / file, keep)
    refused(tmp_path, pair, words=(file,))


def test_a_gguf_that_is_something_else(tmp_path: Path, copy_of: Callable[[str], Path]) -> None:
    pair = copy_of("pair")
    shutil.copy(pair.parent / "pair" / TOWER, tmp_path / "kept")
    (pair / TOWER).write_bytes(b"a picture, perhaps" * 99)
    refused(tmp_path, pair, words=(TOWER, "not GGUF"))
    refused(tmp_path, tmp_path / "none.gguf", words=("none.gguf", "missing"))


@pytest.mark.parametrize(
    ("file", "change", "word"),
    [
        (DECODER, without("blk.2.attn_k.bias"), "layers.2.self_attn.k_proj.bias' is missing"),
        (DECODER, without("token_embd.weight"), "token_embd.weight"),
        (DECODER, renamed("output_norm.weight", "output_norms.weight"), "norm.weight' is missing"),
        (DECODER, narrowed("blk.0.ffn_up.weight"), "mlp.up_proj.weight' has the wrong shape"),
        (TOWER, without("mm.0.weight"), "mm.0.weight"),
        (TOWER, without("v.post_ln.bias"), "post_layernorm.bias' is missing"),
        (TOWER, narrowed("v.position_embd.weight"), "position_embedding.weight' has the wrong"),
        (TOWER, renamed("mm.2.bias", "mm.3.bias"), "2.bias' is missing"),
        (TOWER, renamed("v.head.probe", "v.tail.probe"), "unknown tensor(s), first 'v.tail.probe'"),
    ],
)
def test_gguf_tensors_that_are_not_the_models(
    tmp_path: Path, copy_of: Callable[[str], Path], file: str, change: Any, word: str
) -> None:
    pair = copy_of("pair")
    edit_gguf(pair / file, tensor=change)
    line = refused(tmp_path, pair, words=(word,))
    assert "unknown" not in word or file in line


def test_folders_in_which_the_files_cannot_be_told(
    tmp_path: Path, copy_of: Callable[[str], Path]
) -> None:
    pair = copy_of("pair")
    shutil.copy(pair / DECODER, pair / "second.gguf")
    words = ("several language models", DECODER, "second.gguf", "name the one")
    refused(tmp_path, pair, words=words)
    (pair / "second.gguf").unlink()
    shutil.copy(pair / TOWER, pair / "mmproj-f32.gguf")
    words = ("vision tower", TOWER, "mmproj-f32.gguf", "--vision")
    refused(tmp_path, pair, words=words)
    for name in (TOWER, "mmproj-f32.gguf"):
        (pair / name).unlink()
    refused(tmp_path, pair, words=("no mmproj file beside it", "--vision"))
    refused(tmp_path, pair / DECODER, words=("no mmproj file beside it", "--vision"))
    refused(tmp_path, pair, "--vision", pair / "none.gguf", words=("none.gguf", "missing"))
    (pair / DECODER).unlink()
    refused(tmp_path, pair, words=("config.json",))


# GGUF keys


ABSURD = [
    (DECODER, "qwen2.block_count", 10**9),
    (DECODER, "qwen2.block_count", None),
    (DECODER, "qwen2.attention.head_count", 0),
    (DECODER, "qwen2.attention.head_count_kv", 2**62),
    (DECODER, "qwen2.feed_forward_length", -96),
    (DECODER, "qwen2.feed_forward_length", "96"),
    (DECODER, "qwen2.embedding_length", [64]),
    (DECODER, "qwen2.context_length", 0),
    (DECODER, "qwen2.context_length", 1.5),
    (DECODER, "qwen2.rope.freq_base", "much"),
    (DECODER, "qwen2.rope.freq_base", float("nan")),
    (DECODER, "qwen2.attention.layer_norm_rms_epsilon", -1.0),
    (DECODER, "qwen2.rope.scaling.type", "yarn"),
    (DECODER, "qwen2.rope.dimension_count", 8),
    (TOWER, "siglip.vision.image_size", 0),
    (TOWER, "siglip.vision.image_size", 2**40),
    (TOWER, "siglip.vision.patch_size", -8),
    (TOWER, "siglip.vision.block_count", True),
    (TOWER, "siglip.vision.embedding_length", None),
    (TOWER, "siglip.vision.attention.head_count", 2**31),
    (TOWER, "siglip.vision.image_mean", ["a", "b", "c"]),
    (TOWER, "siglip.vision.image_mean", [0.5, 0.5]),
    (TOWER, "siglip.vision.image_std", [0.5, 0.0, 0.5]),
    (TOWER, "siglip.vision.image_std", 0.5),
]
RENAMED = {
    "rope.freq_base": "rope_theta",
    "layer_norm_rms_epsilon": "rms_norm_eps",
    "image_std": "image_std",
}


@pytest.mark.parametrize(("file", "key", "value"), ABSURD, ids=str)
def test_gguf_keys_that_no_model_has(
    tmp_path: Path, copy_of: Callable[[str], Path], file: str, key: str, value: object
) -> None:
    pair = copy_of("pair")
    edit_gguf(pair / file, {key: value})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = refused(tmp_path, pair)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes
    known = [key, *(name for part, name in RENAMED.items() if key.endswith(part))]
    assert any(name in line for name in known), line
    assert f".gguf{os.sep}" not in line  # no file inside a file


def test_an_error_is_short_whatever_a_file_holds(
    tmp_path: Path, copy_of: Callable[[str], Path]
) -> None:
    pair = copy_of("pair")
    edit_gguf(pair / DECODER, {"tokenizer.ggml.pre": "x" * 2**20})
    line = refused(tmp_path, pair, words=("tokenizer.ggml.pre", "wanted qwen2"))
    assert len(line) < 1000
