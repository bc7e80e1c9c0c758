"""OmniVLM checkpoints with random weights: GGUF pairs as published, and the normal form.

`python -m tests.make_omnivlm --out DIR` makes the GGUF pair of the published 968M, F16.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from tests.helpers import GOLDEN, LINES, Config, DtypeName, random_weights, write_weights
from tests.projector_weights import concat_shapes

CONFIGS = GOLDEN / "configs" / "omnivlm"
TOWER, PROJECTOR = "vision_tower.vision_model.", "multi_modal_projector."
DECODER = "language_model.model."
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>")
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Source: Qwen2's tokenizer.json."""
Shapes = dict[str, tuple[int, ...]]
Quantisation = Literal["F32", "F16", "Q8_0"]


def qwen2_tokenizer() -> Tokenizer:
    """A byte-level BPE of Qwen2's kind, trained on a few lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    added = [AddedToken(t, special=True, normalized=False) for t in (*SPECIAL, *VISION_TOKENS)]
    tokenizer.add_special_tokens(added)
    return tokenizer


def tiny_config(group: int = 9, **changes: object) -> Config:
    """config.json of a model that runs in milliseconds: a 9 x 9 grid, 9 or 81 image tokens."""
    published: Config = json.loads((CONFIGS / "OmniVLM-968M.json").read_text())
    tokenizer = qwen2_tokenizer()
    vision = published["vision_config"] | {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 76,  # 9 patches of 8 pixels and a border that fills none
        "patch_size": 8,
    }
    text = published["text_config"] | {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "vocab_size": 448,
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
    }
    return published | {
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "projector_group": group,
        "projector_hidden_size": 128,
        "vision_config": vision,
        "text_config": text,
        **changes,
    }


def published_shapes(config: Mapping[str, Any], *, pooling_head: bool = True) -> Shapes:
    """Every tensor of the normal form; the pooling head is stored though nothing reads it."""
    vision, text = config["vision_config"], config["text_config"]
    eye, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]

    def biased(name: str, rows: int, columns: int) -> Shapes:
        return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    def norm(name: str) -> Shapes:
        return {f"{name}.weight": (eye,), f"{name}.bias": (eye,)}

    grid = vision["image_size"] // patch
    shapes: Shapes = {
        f"{TOWER}embeddings.patch_embedding.weight": (eye, 3, patch, patch),
        f"{TOWER}embeddings.patch_embedding.bias": (eye,),
        f"{TOWER}embeddings.position_embedding.weight": (grid * grid, eye),
        **norm(f"{TOWER}post_layernorm"),
    }
    for i in range(vision["num_hidden_layers"]):
        layer = f"{TOWER}encoder.layers.{i}."
        shapes |= norm(f"{layer}layer_norm1") | norm(f"{layer}layer_norm2")
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= biased(f"{layer}self_attn.{part}", eye, eye)
        shapes |= biased(f"{layer}mlp.fc1", inner, eye) | biased(f"{layer}mlp.fc2", eye, inner)
    if pooling_head:
        head = f"{TOWER}head."
        shapes |= {f"{head}probe": (1, 1, eye)} | norm(f"{head}layernorm")
    hidden, width = config["projector_hidden_size"], text["hidden_size"]
    shapes |= concat_shapes(PROJECTOR, eye, config["projector_group"], hidden, width)
    return shapes | _decoder_shapes(config)


def _decoder_shapes(config: Mapping[str, Any]) -> Shapes:
    text = config["text_config"]
    width, inner, heads = (
        text["hidden_size"],
        text["intermediate_size"],
        text["num_attention_heads"],
    )
    size = text.get("head_dim", width // heads)
    keys = text["num_key_value_heads"] * size
    shapes: Shapes = {f"{DECODER}embed_tokens.weight": (text["vocab_size"], width)}
    for i in range(text["num_hidden_layers"]):
        layer = f"{DECODER}layers.{i}."
        for part, rows in (("q_proj", heads * size), ("k_proj", keys), ("v_proj", keys)):
            shapes[f"{layer}self_attn.{part}.weight"] = (rows, width)
            shapes[f"{layer}self_attn.{part}.bias"] = (rows,)
        shapes |= {
            f"{layer}self_attn.o_proj.weight": (width, heads * size),
            f"{layer}mlp.gate_proj.weight": (inner, width),
            f"{layer}mlp.up_proj.weight": (inner, width),
            f"{layer}mlp.down_proj.weight": (width, inner),
            f"{layer}input_layernorm.weight": (width,),
            f"{layer}post_attention_layernorm.weight": (width,),
        }
    shapes[f"{DECODER}norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["language_model.lm_head.weight"] = (text["vocab_size"], width)
    return shapes


def make_omnivlm(
    folder: Path, config: Mapping[str, Any], *, dtype: DtypeName = "float32", seed: int = 0
) -> Path:
    """Writes the normal form: config.json, tokenizer.json and safetensors."""
    kind = getattr(torch, dtype)
    weights = random_weights(published_shapes(config), seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, {name: torch.from_numpy(value).to(kind) for name, value in weights})
    (folder / "config.json").write_text(json.dumps(dict(config), indent=1))
    qwen2_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def gguf_name(name: str) -> str:
    """The name that a tensor of the normal form has in the published GGUF files."""
    if name == "language_model.lm_head.weight":
        return "output.weight"
    for old, new in (
        (f"{TOWER}encoder.layers.", "v.blk."),
        (f"{TOWER}embeddings.patch_embedding", "v.patch_embd"),
        (f"{TOWER}embeddings.position_embedding", "v.position_embd"),
        (f"{TOWER}post_layernorm", "v.post_ln"),
        (f"{TOWER}head", "v.head"),
        (PROJECTOR, "mm."),
        (f"{DECODER}layers.", "blk."),
        (f"{DECODER}embed_tokens", "token_embd"),
        (f"{DECODER}norm", "output_norm"),
        (".self_attn.out_proj", ".attn_out"),
        (".self_attn.o_proj", ".attn_output"),
        (".layer_norm1", ".ln1"),
        (".layer_norm2", ".ln2"),
        (".mlp.fc1", ".ffn_down"),
        (".mlp.fc2", ".ffn_up"),
        (".input_layernorm", ".attn_norm"),
        (".post_attention_layernorm", ".ffn_norm"),
    ):
        name = name.replace(old, new)
    for part in "qkv":
        name = name.replace(f".self_attn.{part}_proj", f".attn_{part}")
    for part in ("gate", "up", "down"):
        name = name.replace(f".mlp.{part}_proj", f".ffn_{part}")
    return name


def make_gguf_pair(
    folder: Path,
    config: Mapping[str, Any],
    *,
    kind: Quantisation = "F16",
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
    weights: Iterable[tuple[str, NDArray[np.float32]]] | None = None,
) -> tuple[Path, Path]:
    """Writes a language model and its vision tower as the published files are.

    Args:
        folder: Where to write.
        config: The normal form's config.json.
        kind: How matrices of the language model are stored; the tower's are F16 beside Q8_0.
        tokenizer: Of the language model; None takes the small one.
        seed: Of random weights.
        weights: The tensors by their names in the normal form; None draws them.

    Returns:
        The two files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / f"llm-{kind}.gguf", folder / "mmproj-f16.gguf"
    decoder = gguf.GGUFWriter(files[0], "qwen2", use_temp_file=True)
    tower = gguf.GGUFWriter(files[1], "siglip", use_temp_file=True)
    _add_text_keys(decoder, config["text_config"])
    _add_tokens(decoder, tokenizer or qwen2_tokenizer(), config["text_config"])
    _add_vision_keys(tower, config)
    drawn = random_weights(published_shapes(config), seed) if weights is None else weights
    for name, value in drawn:
        of_tower = name.startswith((TOWER, PROJECTOR))
        stored = ("F16" if kind == "Q8_0" else kind) if of_tower else kind
        _add_tensor(tower if of_tower else decoder, gguf_name(name), value, stored)
    for writer in (decoder, tower):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return files


def _add_tensor(
    writer: gguf.GGUFWriter, name: str, value: NDArray[np.float32], kind: Quantisation
) -> None:
    """Vectors and the positions stay float32, as llama.cpp's converters leave them."""
    if value.ndim == 1 or kind == "F32":
        writer.add_tensor(name, value)
    elif kind == "F16" or value.shape[-1] % 32:
        writer.add_tensor(name, value.astype(np.float16))
    else:
        packed = gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)


def _add_text_keys(writer: gguf.GGUFWriter, text: Mapping[str, Any]) -> None:
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_rope_freq_base(text["rope_theta"])
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])


def _add_tokens(writer: gguf.GGUFWriter, tokenizer: Tokenizer, text: Mapping[str, Any]) -> None:
    """The vocabulary, filled up to the rows of the embedding as converters do."""
    model = json.loads(tokenizer.to_str())["model"]
    added = tokenizer.get_added_tokens_decoder()
    names = {i: token for token, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    rows = range(text["vocab_size"])
    normal, control, unused = (
        int(gguf.TokenType.NORMAL),
        int(gguf.TokenType.CONTROL),
        int(gguf.TokenType.UNUSED),
    )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in rows])
    writer.add_token_types(
        [control if i in added else normal if i in names else unused for i in rows]
    )
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    writer.add_token_merges(merges)
    writer.add_eos_token_id(text["eos_token_id"])
    writer.add_bos_token_id(text["bos_token_id"])


def _add_vision_keys(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    vision = config["vision_config"]
    for key, value in (
        ("image_size", vision["image_size"]),
        ("patch_size", vision["patch_size"]),
        ("embedding_length", vision["hidden_size"]),
        ("feed_forward_length", vision["intermediate_size"]),
        ("projection_dim", config["projector_hidden_size"]),
        ("attention.head_count", vision["num_attention_heads"]),
        ("block_count", vision["num_hidden_layers"]),
    ):
        writer.add_uint32(f"siglip.vision.{key}", value)
    writer.add_array("siglip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("siglip.vision.image_std", [0.5, 0.5, 0.5])
    writer.add_bool("siglip.has_omni_vlm_projector", True)


def published_config(config_file: Path) -> Config:
    """A published config, but for the ids of the small tokenizer."""
    config: Config = json.loads(config_file.read_text())
    small = tiny_config()
    config["image_token_id"] = small["image_token_id"]
    for key in ("eos_token_id", "bos_token_id"):
        config["text_config"][key] = small["text_config"][key]
    return config


def make_published_pair(folder: Path, config_file: Path, kind: Quantisation = "F16") -> None:
    """Writes a pair of a published shape, with the small tokenizer."""
    make_gguf_pair(folder, published_config(config_file), kind=kind)


def main() -> None:
    """Makes a GGUF pair of the published shape from the command line."""
    parser = argparse.ArgumentParser(description="OmniVLM with random weights")
    parser.add_argument("--config", type=Path, default=CONFIGS / "OmniVLM-968M.json")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--kind", choices=("F32", "F16", "Q8_0"), default="F16")
    arguments = parser.parse_args()
    make_published_pair(arguments.out, arguments.config, arguments.kind)


if __name__ == "__main__":
    main()
