"""MobileVLM checkpoints with random weights in the published layout.

`python -m tests.make_mobilevlm --config tests/golden/configs/mobilevlm/MobileVLM_V2-1.7B.json
--out DIR` makes one of a published size.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from tests.helpers import GOLDEN, Config, DtypeName, random_weights, write_weights
from tests.projector_weights import ldp_shapes, ldpv2_shapes
from tests.sentencepiece_files import train

CONFIGS = GOLDEN / "configs" / "mobilevlm"
CLIP_L_336: Config = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
"""The tower that the published configs name."""
TINY_CLIP: Config = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 48,
    "patch_size": 6,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-05,
    "projection_dim": 32,
}
TOWER, PROJECTOR = "model.vision_tower.vision_tower.", "model.mm_projector."
Form = Literal["safetensors", "bin"]
Shapes = dict[str, tuple[int, ...]]


def tiny_config(projector: str = "ldpnetv2", **changes: object) -> Config:
    """config.json of a model that runs in milliseconds: 64 wide, 2 + 3 layers, 16 image tokens."""
    published: Config = json.loads((CONFIGS / "MobileVLM_V2-1.7B.json").read_text())
    return published | {
        "mm_projector_type": projector,
        "mm_vision_tower": "vision_tower",
        "mm_hidden_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "max_sequence_length": 512,
        "vocab_size": 448,
        **changes,
    }


@lru_cache(maxsize=1)
def sentencepiece_model() -> bytes:
    """A tokenizer.model of LLaMA's kind with about 400 pieces."""
    return train(split_by_unicode_script=True, vocab_size=400)


def clip_shapes(clip: Mapping[str, Any]) -> Shapes:
    """Every tensor of a CLIP vision model, all layers."""
    width, inner, patch = clip["hidden_size"], clip["intermediate_size"], clip["patch_size"]

    def norm(name: str) -> Shapes:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    at = "vision_model.embeddings."
    shapes: Shapes = {
        f"{at}class_embedding": (width,),
        f"{at}patch_embedding.weight": (width, 3, patch, patch),
        f"{at}position_embedding.weight": ((clip["image_size"] // patch) ** 2 + 1, width),
        **norm("vision_model.pre_layrnorm"),
        **norm("vision_model.post_layernorm"),
    }
    for i in range(clip["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{i}."
        shapes |= norm(f"{layer}layer_norm1") | norm(f"{layer}layer_norm2")
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{layer}self_attn.{name}.weight"] = (width, width)
            shapes[f"{layer}self_attn.{name}.bias"] = (width,)
        shapes |= {f"{layer}mlp.fc1.weight": (inner, width), f"{layer}mlp.fc1.bias": (inner,)}
        shapes |= {f"{layer}mlp.fc2.weight": (width, inner), f"{layer}mlp.fc2.bias": (width,)}
    return shapes


def projector_shapes(kind: str, vision: int, width: int) -> Shapes:
    """Every tensor of the projector, by the kinds of the published configs."""
    if kind == "ldpnetv2":
        return ldpv2_shapes(PROJECTOR, vision, width)
    return ldp_shapes(PROJECTOR, vision, width, max(8, (width // 4 + 4) // 8 * 8))


def published_shapes(config: Mapping[str, Any], clip: Mapping[str, Any]) -> Shapes:
    """Every tensor of a checkpoint that holds its vision tower."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim", width // config["num_attention_heads"])
    rows = config["num_attention_heads"] * head
    keys = config["num_key_value_heads"] * head
    shapes: Shapes = {TOWER + name: shape for name, shape in clip_shapes(clip).items()}
    shapes |= projector_shapes(config["mm_projector_type"], clip["hidden_size"], width)
    shapes["model.embed_tokens.weight"] = (config["vocab_size"], width)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {
            f"{layer}self_attn.q_proj.weight": (rows, width),
            f"{layer}self_attn.k_proj.weight": (keys, width),
            f"{layer}self_attn.v_proj.weight": (keys, width),
            f"{layer}self_attn.o_proj.weight": (width, rows),
            f"{layer}mlp.gate_proj.weight": (inner, width),
            f"{layer}mlp.up_proj.weight": (inner, width),
            f"{layer}mlp.down_proj.weight": (width, inner),
            f"{layer}input_layernorm.weight": (width,),
            f"{layer}post_attention_layernorm.weight": (width,),
        }
    shapes["model.norm.weight"] = (width,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    return shapes


def make_mobilevlm(
    folder: Path,
    config: Mapping[str, Any],
    clip: Mapping[str, Any] | None = None,
    *,
    form: Form = "bin",
    dtype: DtypeName = "float32",
    shards: int = 1,
    seed: int = 0,
    tower_apart: Path | None = None,
) -> Path:
    """Writes a checkpoint directory.

    Args:
        folder: Where to write.
        config: config.json, e.g. from `tiny_config`.
        clip: The config of the tower; None takes the tiny one.
        form: Which weight files.
        dtype: How weights are stored.
        shards: In how many files.
        seed: Of the weights.
        tower_apart: A second folder, for a CLIP directory that has the tower's weights; the
            checkpoint then has none.
    """
    clip = TINY_CLIP if clip is None else clip
    kind = getattr(torch, dtype)
    shapes = published_shapes(config, clip)
    weights = {n: torch.from_numpy(v).to(kind) for n, v in random_weights(shapes, seed)}
    folder.mkdir(parents=True, exist_ok=True)
    write_tower_config(folder / "vision_tower" if tower_apart is None else tower_apart, clip)
    if tower_apart is not None:
        tower = {n.removeprefix(TOWER): w for n, w in weights.items() if n.startswith(TOWER)}
        weights = {n: w for n, w in weights.items() if not n.startswith(TOWER)}
        write_weights(tower_apart, tower | {"logit_scale": torch.ones(1)})
    if form == "bin":
        write_bin(folder, weights, shards)
    else:
        write_weights(folder, weights, shards)
    write_small_files(folder, config)
    return folder


def write_bin(folder: Path, weights: Mapping[str, torch.Tensor], shards: int = 1) -> None:
    """Writes pytorch_model.bin, or shards of it round robin with an index."""
    # Old checkpoints carry buffers that later versions compute.
    weights = {**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return
    names = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    place = {tensor: names[i % shards] for i, tensor in enumerate(weights)}
    for name in names:
        torch.save({k: v for k, v in weights.items() if place[k] == name}, folder / name)
    index = {"metadata": {}, "weight_map": place}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def write_tower_config(folder: Path, clip: Mapping[str, Any]) -> None:
    """Writes config.json and preprocessor_config.json of a CLIP directory."""
    folder.mkdir(parents=True, exist_ok=True)
    size = clip["image_size"]
    preprocessor = {
        "crop_size": size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": size,
    }
    (folder / "config.json").write_text(json.dumps(dict(clip), indent=1))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=1))


def write_small_files(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes everything of a checkpoint but weights and tower."""
    files = {
        "config.json": dict(config),
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1))
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())


def main() -> None:
    """Makes a checkpoint of a published shape from the command line."""
    parser = argparse.ArgumentParser(description="MobileVLM with random weights")
    parser.add_argument("--config", type=Path, required=True, help="a published config.json")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config = json.loads(arguments.config.read_text())
    make_mobilevlm(arguments.out, config, CLIP_L_336, dtype=arguments.dtype, seed=arguments.seed)


if __name__ == "__main__":
    main()
