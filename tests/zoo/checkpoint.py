"""Writes and reads a checkpoint directory in the published SmolVLM layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tests.zoo.tokenizer import END, GRID, IMAGE, train_tokenizer

TILE = 64
"""Side of a tile in pixels."""
LONGEST_EDGE = 2 * TILE
"""So a square picture becomes 2 x 2 tiles and a wide one 1 x 2, each with a thumbnail."""

CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""The template of SmolVLM-Instruct, character for character."""

Config = dict[str, Any]


def tiny_config(tokenizer: Tokenizer) -> Config:
    """config.json of the tiny checkpoint, with the keys of the published files."""
    return {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "model_type": "smolvlm",
        "image_token_id": tokenizer.token_to_id(IMAGE),
        "pad_token_id": 2,
        "scale_factor": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "text_config": {
            "architectures": ["VLlama3ForCausalLM"],
            "model_type": "llama",
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "rope_interleaved": False,
            "vocab_size": tokenizer.get_vocab_size(),
            "pad_token_id": 2,
            "pixel_shuffle_factor": 2,
            "qk_layer_norms": False,
            "use_resampler": False,
        },
        "vision_config": {
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "image_size": TILE,
            "patch_size": 8,
            "num_attention_heads": 4,
            "max_image_size": {"longest_edge": TILE},
            "size": {"longest_edge": LONGEST_EDGE},
            "use_base_siglip": True,
            "model_type": "smolvlm_vision",
        },
    }


def tokens_per_tile(config: Config) -> int:
    """Image tokens that one tile becomes."""
    vision = config["vision_config"]
    side: int = vision["image_size"] // vision["patch_size"] // config["scale_factor"]
    return side * side


def other_files(config: Config, tokenizer: Tokenizer) -> dict[str, Config]:
    """The small JSON files beside the weights, by name."""
    tile = {"longest_edge": config["vision_config"]["image_size"]}
    longest = {"longest_edge": config["vision_config"]["size"]["longest_edge"]}
    rows = [f"<row_{r}_col_{c}>" for r in range(1, GRID + 1) for c in range(1, GRID + 1)]
    special = ["<fake_token_around_image>", "<image>", END, "<global-img>", *rows]
    preprocessor = {
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "SmolVLMImageProcessor",
        "max_image_size": tile,
        "processor_class": "SmolVLMProcessor",
        "resample": 1,
        "rescale_factor": 0.00392156862745098,
        "size": longest,
        "video_sampling": {"fps": 1, "max_frames": 64, "video_size": tile},
    }
    return {
        "config.json": config,
        "preprocessor_config.json": preprocessor,
        "processor_config.json": {
            "image_seq_len": tokens_per_tile(config),
            "processor_class": "SmolVLMProcessor",
        },
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
        "generation_config.json": {
            "_from_model_config": True,
            "bos_token_id": 0,
            "eos_token_id": tokenizer.token_to_id(END),
            "pad_token_id": 2,
        },
        "tokenizer_config.json": {
            "add_prefix_space": False,
            "additional_special_tokens": special,
            "bos_token": "<|im_start|>",
            "eos_token": END,
            "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["text_config"]["max_position_embeddings"],
            "processor_class": "SmolVLMProcessor",
            "tokenizer_class": "GPT2Tokenizer",
            "end_of_utterance_token": END,
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "image_token": "<image>",
        },
    }


def write(out: Path, config: Config, weights: Mapping[str, torch.Tensor]) -> None:
    """Write the whole directory; the weights are rounded to fp16.

    Shapes:
        weights: by published name, as `model.param_shapes` gives them.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save(str(out / "tokenizer.json"))
    for name, content in other_files(config, tokenizer).items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    halves = {k: v.detach().to(torch.float16).contiguous() for k, v in weights.items()}
    save_file(halves, out / "model.safetensors", metadata={"format": "pt"})


def read(path: Path) -> tuple[Config, dict[str, torch.Tensor], Tokenizer]:
    """Config, weights as fp32, and tokenizer of a directory that `write` made."""
    config: Config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    weights = {k: v.float() for k, v in load_file(path / "model.safetensors").items()}
    return config, weights, Tokenizer.from_file(str(path / "tokenizer.json"))
