"""MobileVLM V2: CLIP without its last layer, LDPv2 and a LLaMA decoder."""

from __future__ import annotations

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
from tests.zoo.questions import ONE_WORD, PHRASES
from tests.zoo.tokenizer import SentencePiece, Tokens, sentences, train_sentencepiece

SIZE, PATCH = 144, 6
"""24 x 24 patches, as the published tower has, which the projector turns into 12 x 12 tokens."""
LAYERS = 5
"""The last one is stored, as published, and never used."""
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
GROUND = tuple(int(255 * value) for value in MEAN)
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
OPENING = f"{SYSTEM} USER: "
IMAGE_ID = -200
"""As in the published code: no id of the tokenizer."""
PIECES = 640
PRINTABLE = "".join(map(chr, range(33, 127)))
"""So that every printable character has a piece."""
TOWER, EYE = "vision_tower", "model.vision_tower.vision_tower.vision_model."
PROJECTOR = projector_oracle.MOBILEVLM


class MobileVLM(Family):
    """The layout of the published MobileVLM V2 files."""

    name = "mobilevlm-tiny"
    model_type = "mobilevlm"
    exam = WHOLE
    label_kinds = ("shape", "colour", "character", "middle", "row", "column")
    outputs = (
        PROJECTOR + "mlp.mlp.2.weight",
        PROJECTOR + "mlp.mlp.2.bias",
        PROJECTOR + "peg.peg.0.bias",
    )
    untrained = (f"vision_model.encoder.layers.{LAYERS - 1}.", "vision_model.post_layernorm.")
    side = SIZE // PATCH // 2

    @lru_cache(maxsize=1)  # noqa: B019  (one instance of a family ever exists)
    def train_tokenizer(self) -> SentencePiece:
        """BPE with byte fallback."""
        words = [OPENING, "ASSISTANT:"] * 50
        # A question follows a line break, without a space; the trainer knows no line breaks.
        firsts = {phrase.split()[0] for kind in ONE_WORD for phrase in PHRASES[kind]}
        words += [f"({word}" for word in sorted(firsts)] * 50
        text = list(sentences(""))
        # Answers stand once each among thousands of questions; each word is to be one piece.
        words += [answer for answer in text if " " not in answer] * 50
        return train_sentencepiece([PRINTABLE, *words, *text], PIECES)

    def load_tokenizer(self, folder: Path) -> SentencePiece:
        """From tokenizer.model."""
        return SentencePiece.load(folder)

    def config(self, tokens: Tokens) -> Config:
        """Sizes of the tiny checkpoint."""
        return {
            "_name_or_path": self.name,
            "architectures": ["MobileLlamaForCausalLM"],
            "model_type": self.model_type,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "hidden_act": "silu",
            "image_aspect_ratio": "pad",
            "image_grid_pinpoints": None,
            "initializer_range": 0.02,
            "mm_hidden_size": 128,
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": TOWER,
            "vision_tower_type": "clip",
            "pretraining_tp": 1,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "use_cache": True,
            "use_mm_proj": True,
            "freeze_mm_mlp_adapter": False,
            "tune_mm_mlp_adapter": False,
            "vocab_size": tokens.size,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "max_position_embeddings": 1024,
            "max_sequence_length": 1024,
            "rms_norm_eps": 1e-06,
            "mm_projector_type": "ldpnetv2",
            "mm_projector_lr": None,
        }

    def other_files(self, config: Config, tokens: Tokens) -> dict[str, Config]:
        """The tower's own folder, generation and tokenizer settings."""
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        content = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        wrapped = {name: {"content": text, **content} for name, text in special.items()}
        size = {"height": SIZE, "width": SIZE}
        return {
            f"{TOWER}/config.json": tower_config(),
            f"{TOWER}/preprocessor_config.json": {
                "crop_size": size,
                "do_center_crop": True,
                "do_convert_rgb": True,
                "do_normalize": True,
                "do_rescale": True,
                "do_resize": True,
                "image_mean": list(MEAN),
                "image_processor_type": "CLIPImageProcessor",
                "image_std": list(STD),
                "resample": 3,
                "rescale_factor": 0.00392156862745098,
                "size": {"shortest_edge": SIZE},
            },
            "generation_config.json": {
                "_from_model_config": True,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 0,
            },
            "special_tokens_map.json": {**wrapped, "pad_token": "<unk>"},
            "tokenizer_config.json": {
                "add_bos_token": True,
                "add_eos_token": False,
                **wrapped,
                "clean_up_tokenization_spaces": False,
                "legacy": True,
                "model_max_length": config["max_position_embeddings"],
                "pad_token": None,
                "padding_side": "right",
                "sp_model_kwargs": {},
                "tokenizer_class": "LlamaTokenizer",
            },
        }

    def param_shapes(self, config: Config) -> Shapes:
        """Tower, projector and decoder."""
        vision, width = tower_config(), config["hidden_size"]
        d = vision["hidden_size"]
        shapes: Shapes = {
            EYE + "embeddings.class_embedding": (d,),
            EYE + "embeddings.patch_embedding.weight": (d, 3, PATCH, PATCH),
            EYE + "embeddings.position_embedding.weight": ((SIZE // PATCH) ** 2 + 1, d),
            EYE + "pre_layrnorm.weight": (d,),
            EYE + "pre_layrnorm.bias": (d,),
        }
        shapes |= vision_layer_shapes(vision, EYE)
        shapes |= {
            PROJECTOR + "mlp.mlp.0.weight": (width, d),
            PROJECTOR + "mlp.mlp.0.bias": (width,),
        }
        shapes |= {PROJECTOR + "mlp.mlp.2.weight": (width, width)}
        shapes |= {PROJECTOR + "mlp.mlp.2.bias": (width,)}
        shapes |= {PROJECTOR + "peg.peg.0.weight": (width, 1, 3, 3)}
        shapes |= {PROJECTOR + "peg.peg.0.bias": (width,)}
        shapes |= decoder_shapes(config, "model.")
        return shapes | {"lm_head.weight": (config["vocab_size"], width)}

    def pixels(self, image: Image.Image) -> Pixels:
        """Pad to a centred square, then resize."""
        image = image.convert("RGB")
        side = max(image.size)
        square = Image.new("RGB", (side, side), GROUND)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return Pixels(np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BICUBIC))[None])

    def patch_labels(self, scene: Scene, pixels: Pixels) -> NDArray[np.int64]:
        """One label for the four patches of a token, which its mean mixes."""
        width, height = scene.image.size
        side = max(width, height)
        left, top = -((side - width) // 2), -((side - height) // 2)
        box = (float(left), float(top), float(left + side), float(top + side))
        labels = label_grid(scene, box, self.side, self.side)[None]
        placed = with_places(labels, self.label_kinds)
        return placed.reshape(1, -1, 1, len(self.label_kinds))

    def image_id(self, config: Config) -> int:
        """No id of the tokenizer."""
        del config
        return IMAGE_ID

    def prefix(self, tokens: Tokens, config: Config, grid: tuple[int, int]) -> list[int]:
        """Begin, system sentence, image tokens; what follows is encoded on its own."""
        del config, grid
        return [1, *tokens.encode(OPENING), *[IMAGE_ID] * self.side**2]

    def asked(self, tokens: Tokens, question: str) -> list[int]:
        """The question and the assistant's turn, behind their own dummy prefix."""
        return tokens.encode(f"\n{question} ASSISTANT:")

    def answered(self, tokens: Tokens, question: str, answer: str) -> list[int]:
        """The answer as it continues the text, and `</s>`."""
        asked = self.asked(tokens, question)
        whole = tokens.encode(f"\n{question} ASSISTANT: {answer}")
        if whole[: len(asked)] != asked:
            raise ValueError(f"zoo: the pieces of {question!r} change with an answer behind them")
        return [*whole[len(asked) :], 2]

    def end_id(self, tokens: Tokens) -> int:
        """`</s>`."""
        del tokens
        return 2

    def image_tokens(self, params: Params, config: Config, pixels: Tensor) -> Tensor:
        """CLIP up to its last layer but one, then LDPv2."""
        del config
        vision = tower_config()
        x = patch_vectors(pixels, PATCH, torch.tensor(MEAN), torch.tensor(STD))
        at = EYE + "embeddings."
        x = F.linear(x, params[at + "patch_embedding.weight"].flatten(1))
        first = params[at + "class_embedding"].expand(len(x), 1, -1)
        x = torch.cat([first, x], 1) + params[at + "position_embedding.weight"]
        x = layer_norm(params, EYE + "pre_layrnorm", x, vision["layer_norm_eps"])
        x = vision_layers(params, EYE, vision, x, LAYERS - 1, "quick_gelu")
        return projector_oracle.ldp_v2(params, x[:, 1:])

    def decode(
        self, params: Params, config: Config, x: Tensor, positions: Tensor, mask: Tensor
    ) -> Tensor:
        """LLaMA."""
        return decode(params, "model.", config, x, positions, mask)

    def embedding(self) -> str:
        """Token embeddings."""
        return "model.embed_tokens.weight"

    def head(self) -> str:
        """A matrix of its own."""
        return "lm_head.weight"


def tower_config() -> Config:
    """config.json of the vision tower's folder."""
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "attention_dropout": 0.0,
        "hidden_act": "quick_gelu",
        "hidden_size": 128,
        "image_size": SIZE,
        "intermediate_size": 384,
        "layer_norm_eps": 1e-05,
        "num_attention_heads": 4,
        "num_channels": 3,
        "num_hidden_layers": LAYERS,
        "patch_size": PATCH,
        "projection_dim": 128,
    }
