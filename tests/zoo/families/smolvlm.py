"""SmolVLM: tiles through SigLIP, pixel shuffle and one matrix, a LLaMA decoder."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tests.zoo.draw import Scene
from tests.zoo.families.base import Family, Pixels
from tests.zoo.labels import by_block, label_grid, with_places
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
from tests.zoo.questions import FULL
from tests.zoo.tiles import split
from tests.zoo.tokenizer import ByteLevel, Tokens, sentences, train_byte_level

TILE = 64
"""Side of a tile in pixels."""
LONGEST_EDGE = 2 * TILE
"""So a square picture becomes 2 x 2 tiles and a wide one 1 x 2, each with a thumbnail."""
PATCH, SCALE = 8, 2
FIRST_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GLOBAL, FAKE, IMAGE, END = (
    "<global-img>",
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
)
GRID = 6
"""Rows and columns of tiles that have a token, as published."""
ROWS = [f"<row_{r}_col_{c}>" for r in range(1, GRID + 1) for c in range(1, GRID + 1)]
PIECES = 512
CHAT_WORDS = "User: Assistant: System: a an and are as at by for from in is it of on or the"
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""The template of SmolVLM-Instruct, character for character."""
EYE, PROJECTOR, TEXT = (
    "model.vision_model.",
    "model.connector.modality_projection.proj.weight",
    "model.text_model.",
)


class SmolVLM(Family):
    """The layout of the published SmolVLM files."""

    name = "smolvlm-tiny"
    model_type = "smolvlm"
    exam = FULL
    label_kinds = ("shape", "colour", "character", "middle", "row", "column")
    outputs = (PROJECTOR,)
    side = TILE // PATCH

    @lru_cache(maxsize=1)  # noqa: B019  (one instance of a family ever exists)
    def train_tokenizer(self) -> ByteLevel:
        """Byte-level BPE with single digits."""
        words = ["User:", "Assistant:", "System:", "\n\n", "\n", "\nAssistant:"] * 50
        added = [GLOBAL, *ROWS, FAKE, IMAGE, END]
        text = [*words, CHAT_WORDS, *sentences()]
        return train_byte_level(text, PIECES, FIRST_TOKENS, added, qwen=False)

    def load_tokenizer(self, folder: Path) -> ByteLevel:
        """From tokenizer.json."""
        return ByteLevel.load(folder)

    def config(self, tokens: Tokens) -> Config:
        """Sizes of the tiny checkpoint, with the keys of the published files."""
        return {
            "architectures": ["SmolVLMForConditionalGeneration"],
            "model_type": self.model_type,
            "image_token_id": tokens.piece_id(IMAGE),
            "pad_token_id": 2,
            "scale_factor": SCALE,
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
                "vocab_size": tokens.size,
                "pad_token_id": 2,
                "pixel_shuffle_factor": SCALE,
                "qk_layer_norms": False,
                "use_resampler": False,
            },
            "vision_config": {
                "hidden_size": 128,
                "intermediate_size": 384,
                "num_hidden_layers": 4,
                "image_size": TILE,
                "patch_size": PATCH,
                "num_attention_heads": 4,
                "max_image_size": {"longest_edge": TILE},
                "size": {"longest_edge": LONGEST_EDGE},
                "use_base_siglip": True,
                "model_type": "smolvlm_vision",
            },
        }

    def other_files(self, config: Config, tokens: Tokens) -> dict[str, Config]:
        """The small JSON files beside the weights, by name."""
        tile = {"longest_edge": config["vision_config"]["image_size"]}
        special = [FAKE, IMAGE, END, GLOBAL, *ROWS]
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
            "size": {"longest_edge": config["vision_config"]["size"]["longest_edge"]},
            "video_sampling": {"fps": 1, "max_frames": 64, "video_size": tile},
        }
        return {
            "preprocessor_config.json": preprocessor,
            "processor_config.json": {
                "image_seq_len": tokens_per_tile(config),
                "processor_class": "SmolVLMProcessor",
            },
            "chat_template.json": {"chat_template": CHAT_TEMPLATE},
            "generation_config.json": {
                "_from_model_config": True,
                "bos_token_id": 0,
                "eos_token_id": tokens.piece_id(END),
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
                "fake_image_token": FAKE,
                "global_image_token": GLOBAL,
                "image_token": IMAGE,
            },
        }

    def param_shapes(self, config: Config) -> Shapes:
        """Vision, projector, decoder and head."""
        vision, text, scale = config["vision_config"], config["text_config"], config["scale_factor"]
        d, patch, width = vision["hidden_size"], vision["patch_size"], text["hidden_size"]
        shapes: Shapes = {
            EYE + "embeddings.patch_embedding.weight": (d, 3, patch, patch),
            EYE + "embeddings.patch_embedding.bias": (d,),
            EYE + "embeddings.position_embedding.weight": ((vision["image_size"] // patch) ** 2, d),
        }
        shapes |= vision_layer_shapes(vision, EYE)
        shapes[PROJECTOR] = (width, d * scale * scale)
        shapes |= decoder_shapes(text, TEXT)
        return shapes | {"lm_head.weight": (text["vocab_size"], width)}

    def pixels(self, image: Image.Image) -> Pixels:
        """Tiles and a thumbnail."""
        values, rows, columns = split(image, TILE, LONGEST_EDGE)
        return Pixels(values, (rows, columns))

    def patch_labels(self, scene: Scene, pixels: Pixels) -> NDArray[np.int64]:
        """Four patches to a token; characters are too small to be asked in the thumbnail."""
        rows, columns = (max(n, 1) for n in pixels.grid)
        side = self.side
        box = (0.0, 0.0, float(scene.image.width), float(scene.image.height))
        fine = label_grid(scene, box, rows * side, columns * side)
        labels = fine.reshape(rows, side, columns, side, 4).swapaxes(1, 2)
        labels = labels.reshape(-1, side, side, 4)
        if rows * columns > 1:
            small = label_grid(scene, box, side, side)[None]
            small[..., 2] = -100
            labels = np.concatenate([labels, small])
        return by_block(with_places(labels, self.label_kinds), SCALE)

    def image_id(self, config: Config) -> int:
        """That of `<image>`."""
        return int(config["image_token_id"])

    def prefix(self, tokens: Tokens, config: Config, grid: tuple[int, int]) -> list[int]:
        """The user's turn with the picture expanded."""
        return tokens.encode(prefix_text(*grid, tokens_per_tile(config)))

    def asked(self, tokens: Tokens, question: str) -> list[int]:
        """The question and what makes the model answer."""
        return tokens.encode(question_text(question))

    def answered(self, tokens: Tokens, question: str, answer: str) -> list[int]:
        """Answer and end."""
        del question
        return tokens.encode(f" {answer}{END}")

    def end_id(self, tokens: Tokens) -> int:
        """That of `<end_of_utterance>`."""
        return tokens.piece_id(END)

    def image_tokens(self, params: Params, config: Config, pixels: Tensor) -> Tensor:
        """SigLIP with its last norm, pixel shuffle and the linear projector."""
        vision, half = config["vision_config"], torch.full((3,), 0.5)
        vision = {"layer_norm_eps": 1e-6, **vision}
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
        scale, grid = config["scale_factor"], math.isqrt(x.shape[1])
        side = grid // scale
        x = x.view(-1, side, scale, side, scale, x.shape[-1])
        x = x.transpose(2, 3).reshape(len(x), side * side, -1)
        return F.linear(x, params[PROJECTOR])

    def decode(
        self, params: Params, config: Config, x: Tensor, positions: Tensor, mask: Tensor
    ) -> Tensor:
        """LLaMA."""
        return decode(params, TEXT, config["text_config"], x, positions, mask)

    def embedding(self) -> str:
        """Token embeddings."""
        return TEXT + "embed_tokens.weight"

    def head(self) -> str:
        """A matrix of its own."""
        return "lm_head.weight"


def tokens_per_tile(config: Config) -> int:
    """Image tokens that one tile becomes."""
    vision = config["vision_config"]
    side: int = vision["image_size"] // vision["patch_size"] // config["scale_factor"]
    return side * side


def prefix_text(rows: int, cols: int, per_tile: int) -> str:
    """Everything up to the question; `rows` and `cols` are 0 for a picture of one tile."""
    image = IMAGE * per_tile
    grid = "".join(
        "".join(f"{FAKE}<row_{r}_col_{c}>{image}" for c in range(1, cols + 1)) + "\n"
        for r in range(1, rows + 1)
    )
    if grid:
        grid += "\n"
    return f"<|im_start|>User:{grid}{FAKE}{GLOBAL}{image}{FAKE}"


def question_text(question: str) -> str:
    """The question and what makes the model answer."""
    return f"{question}{END}\nAssistant:"
