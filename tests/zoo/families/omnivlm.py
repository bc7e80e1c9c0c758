"""OmniVLM: SigLIP, nine consecutive patches to an image token, Qwen2 with a tied head."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tests import projector_oracle
from tests.zoo.draw import Scene
from tests.zoo.families.base import WHOLE, Family, Pixels
from tests.zoo.labels import label_grid, with_places
from tests.zoo.model import (
    Config,
    Params,
    Shapes,
    decode,
    decoder_shapes,
    layer_norm,
    patch_vectors,
    vision_layer_shapes,
    vision_layers,
)
from tests.zoo.questions import KINDS
from tests.zoo.tokenizer import ByteLevel, Tokens, sentences, train_byte_level

SIZE, PATCH, GROUP = 144, 8, 9
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|image_pad|>"
ADDED = [
    "<|endoftext|>",
    START,
    END,
    *(f"<|{what}_{side}|>" for what in ("object_ref", "box", "quad") for side in ("start", "end")),
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    PAD,
    "<|video_pad|>",
]
"""Qwen2's added tokens, in its order; the last keeps the last id."""
SYSTEM = "You are Nano-Omni-VLM, created by Nexa AI. You are a helpful assistant."
OPENING = f"{START}system\n{SYSTEM}{END}\n{START}user\n\n<|vision_start|>"
REPLY = f"\n{START}assistant\n"
"""The model writes this header itself."""
PIECES = 544
EYE, PROJECTOR, TEXT = (
    "vision_tower.vision_model.",
    "multi_modal_projector.",
    "language_model.model.",
)


class OmniVLM(Family):
    """The normal form to which the published GGUF files are brought."""

    name = "omnivlm-tiny"
    model_type = "omnivlm"
    exam = replace(WHOLE, kinds=tuple(kind for kind in KINDS if kind != "read"))
    label_kinds = ("shape", "colour", "character", "middle", "row", "column")
    outputs = (PROJECTOR + "2.weight", PROJECTOR + "2.bias")
    side = SIZE // PATCH

    @lru_cache(maxsize=1)  # noqa: B019  (one instance of a family ever exists)
    def train_tokenizer(self) -> ByteLevel:
        """Byte-level BPE with Qwen2's way to cut text."""
        words = [SYSTEM] * 50 + ["system", "user", "assistant", "\n", "\n\n"] * 50
        return train_byte_level([*words, *sentences("")], PIECES, [], ADDED, qwen=True)

    def load_tokenizer(self, folder: Path) -> ByteLevel:
        """From tokenizer.json."""
        return ByteLevel.load(folder)

    def config(self, tokens: Tokens) -> Config:
        """Sizes of the tiny checkpoint."""
        return {
            "architectures": ["OmniVLMForConditionalGeneration"],
            "model_type": self.model_type,
            "image_token_id": tokens.piece_id(PAD),
            "projector_group": GROUP,
            "projector_hidden_size": 256,
            "tie_word_embeddings": True,
            "torch_dtype": "float16",
            "text_config": {
                "architectures": ["Qwen2ForCausalLM"],
                "attention_dropout": 0.0,
                "bos_token_id": tokens.piece_id(ADDED[0]),
                "eos_token_id": tokens.piece_id(END),
                "hidden_act": "silu",
                "hidden_size": 192,
                "initializer_range": 0.02,
                "intermediate_size": 512,
                "max_position_embeddings": 1024,
                "max_window_layers": 4,
                "model_type": "qwen2",
                "num_attention_heads": 6,
                "num_hidden_layers": 4,
                "num_key_value_heads": 2,
                "rms_norm_eps": 1e-06,
                "rope_theta": 10000.0,
                "sliding_window": 1024,
                "tie_word_embeddings": True,
                "torch_dtype": "float16",
                "use_cache": True,
                "use_sliding_window": False,
                "vocab_size": tokens.size,
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_act": "gelu_pytorch_tanh",
                "hidden_size": 128,
                "image_size": SIZE,
                "intermediate_size": 384,
                "layer_norm_eps": 1e-06,
                "num_attention_heads": 4,
                "num_channels": 3,
                "num_hidden_layers": 4,
                "patch_size": PATCH,
            },
        }

    def other_files(self, config: Config, tokens: Tokens) -> dict[str, Config]:
        """Preprocessing, generation and tokenizer settings."""
        return {
            "preprocessor_config.json": {
                "do_convert_rgb": True,
                "do_normalize": True,
                "do_rescale": True,
                "do_resize": True,
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
                "image_processor_type": "SiglipImageProcessor",
                "resample": 3,
                "rescale_factor": 0.00392156862745098,
                "size": {"height": SIZE, "width": SIZE},
            },
            "generation_config.json": {
                "bos_token_id": tokens.piece_id(ADDED[0]),
                "eos_token_id": [tokens.piece_id(END), tokens.piece_id(ADDED[0])],
                "pad_token_id": tokens.piece_id(ADDED[0]),
                "do_sample": False,
            },
            "tokenizer_config.json": {
                "add_bos_token": False,
                "add_prefix_space": False,
                "additional_special_tokens": ADDED[1:],
                "bos_token": None,
                "clean_up_tokenization_spaces": False,
                "eos_token": END,
                "errors": "replace",
                "model_max_length": config["text_config"]["max_position_embeddings"],
                "pad_token": ADDED[0],
                "split_special_tokens": False,
                "tokenizer_class": "Qwen2Tokenizer",
                "unk_token": None,
            },
        }

    def param_shapes(self, config: Config) -> Shapes:
        """Vision, projector and language model."""
        vision, text = config["vision_config"], config["text_config"]
        d, width, hidden = (
            vision["hidden_size"],
            text["hidden_size"],
            config["projector_hidden_size"],
        )
        patch = vision["patch_size"]
        patches = (vision["image_size"] // patch) ** 2
        shapes: Shapes = {
            EYE + "embeddings.patch_embedding.weight": (d, 3, patch, patch),
            EYE + "embeddings.patch_embedding.bias": (d,),
            EYE + "embeddings.position_embedding.weight": (patches, d),
        }
        shapes |= vision_layer_shapes(vision, EYE)
        shapes[PROJECTOR + "0.weight"] = (hidden, d * config["projector_group"])
        shapes[PROJECTOR + "0.bias"] = (hidden,)
        shapes[PROJECTOR + "2.weight"] = (width, hidden)
        shapes[PROJECTOR + "2.bias"] = (width,)
        return shapes | decoder_shapes(text, TEXT, bias=True)

    def pixels(self, image: Image.Image) -> Pixels:
        """Straight to the square, whatever the aspect."""
        small = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        return Pixels(np.asarray(small)[None])

    def patch_labels(self, scene: Scene, pixels: Pixels) -> NDArray[np.int64]:
        """Nine patches to a token."""
        box = (0.0, 0.0, float(scene.image.width), float(scene.image.height))
        labels = label_grid(scene, box, self.side, self.side)[None]
        placed = with_places(labels, self.label_kinds)
        return placed.reshape(1, -1, GROUP, len(self.label_kinds))

    def image_id(self, config: Config) -> int:
        """That of `<|image_pad|>`."""
        return int(config["image_token_id"])

    def prefix(self, tokens: Tokens, config: Config, grid: tuple[int, int]) -> list[int]:
        """System and user header, then the image tokens."""
        del grid
        count = (
            config["vision_config"]["image_size"] // config["vision_config"]["patch_size"]
        ) ** 2
        return tokens.encode(
            OPENING + PAD * (count // config["projector_group"]) + "<|vision_end|>"
        )

    def asked(self, tokens: Tokens, question: str) -> list[int]:
        """The question and the end of the user's turn; no header follows."""
        return tokens.encode(question + END)

    def answered(self, tokens: Tokens, question: str, answer: str) -> list[int]:
        """Header, answer, end."""
        del question
        return tokens.encode(f"{REPLY}{answer}{END}")

    def end_id(self, tokens: Tokens) -> int:
        """That of `<|im_end|>`."""
        return tokens.piece_id(END)

    def answer_text(self, tokens: Tokens, ids: list[int]) -> str:
        """What follows the header that the model writes."""
        return tokens.decode(ids).strip().removeprefix("assistant").strip()

    def image_tokens(self, params: Params, config: Config, pixels: Tensor) -> Tensor:
        """SigLIP with its last norm, then the projector."""
        vision, half = config["vision_config"], torch.full((3,), 0.5)
        x = patch_vectors(pixels, vision["patch_size"], half, half)
        at = EYE + "embeddings."
        x = F.linear(
            x,
            params[at + "patch_embedding.weight"].flatten(1),
            params[at + "patch_embedding.bias"],
        )
        x = x + params[at + "position_embedding.weight"]
        x = vision_layers(params, EYE, vision, x, vision["num_hidden_layers"], "gelu")
        x = layer_norm(params, EYE + "post_layernorm", x, vision["layer_norm_eps"])
        return projector_oracle.omnivlm(params, x, config["projector_group"])

    def decode(
        self, params: Params, config: Config, x: Tensor, positions: Tensor, mask: Tensor
    ) -> Tensor:
        """Qwen2."""
        return decode(params, TEXT, config["text_config"], x, positions, mask)

    def embedding(self) -> str:
        """Token embeddings."""
        return TEXT + "embed_tokens.weight"

    def head(self) -> str:
        """Tied to the embeddings."""
        return self.embedding()
