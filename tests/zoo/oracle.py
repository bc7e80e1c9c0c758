"""The families through transformers: the reference for training, and what evaluation asks.

SmolVLM is a class of transformers. For the other two, transformers has the tower and the decoder;
between them stand the projectors of `tests.projector_oracle`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from tests import projector_oracle
from tests.zoo.families import FAMILIES
from tests.zoo.families.base import Pixels
from tests.zoo.families.mobilevlm import EYE as CLIP
from tests.zoo.families.mobilevlm import MEAN, STD, tower_config
from tests.zoo.families.omnivlm import EYE as SIGLIP
from tests.zoo.model import Config

Weights = Mapping[str, Tensor]
Logits = Callable[[list[int], Pixels], Tensor]
"""Prompt ids with image tokens, and a picture, to logits [T, vocab]."""


def oracle(config: Config, weights: Weights) -> Logits:
    """Logits of a checkpoint through transformers, in fp32."""
    kinds = {"smolvlm": _smolvlm, "mobilevlm": _mobilevlm, "omnivlm": _omnivlm}
    return kinds[config["model_type"]](config, weights)


def _smolvlm(config: Config, weights: Weights) -> Logits:
    model = SmolVLMForConditionalGeneration(SmolVLMConfig(**config))
    _load(model, weights)

    def logits(ids: list[int], picture: Pixels) -> Tensor:
        pixels = _normalised(picture, (0.5,) * 3, (0.5,) * 3)[None]
        tensor = torch.tensor([ids])
        with torch.no_grad():
            out: Tensor = model(
                input_ids=tensor,
                attention_mask=torch.ones_like(tensor),
                pixel_values=pixels,
                pixel_attention_mask=torch.ones(pixels[:, :, 0].shape, dtype=torch.bool),
            ).logits[0]
        return out

    return logits


def _mobilevlm(config: Config, weights: Weights) -> Logits:
    tower = CLIPVisionModel(CLIPVisionConfig(**tower_config()))
    _load(tower, _below(weights, CLIP, _inner(tower)))
    sizes = {k: v for k, v in config.items() if not k.startswith("mm_") and k != "model_type"}
    decoder = LlamaForCausalLM(LlamaConfig(**sizes))
    others = (CLIP, projector_oracle.MOBILEVLM)
    _load(decoder, {k: v for k, v in weights.items() if not k.startswith(others)})

    def image(picture: Pixels) -> Tensor:
        pixels = _normalised(picture, MEAN, STD)
        states = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
        features = states[config["mm_vision_select_layer"]][:, 1:]
        return projector_oracle.ldp_v2(weights, features)

    return _joined(config, decoder, image)


def _omnivlm(config: Config, weights: Weights) -> Logits:
    tower = SiglipVisionModel(SiglipVisionConfig(**config["vision_config"], vision_use_head=False))
    _load(tower, _below(weights, SIGLIP, _inner(tower)))
    decoder = Qwen2ForCausalLM(Qwen2Config(**config["text_config"]))
    text = _below(weights, "language_model.", "")
    _load(decoder, {**text, "lm_head.weight": text["model.embed_tokens.weight"]})

    def image(picture: Pixels) -> Tensor:
        pixels = _normalised(picture, (0.5,) * 3, (0.5,) * 3)
        features = tower(pixel_values=pixels).last_hidden_state
        return projector_oracle.omnivlm(weights, features, config["projector_group"])

    return _joined(config, decoder, image)


def _joined(config: Config, decoder: Any, image: Callable[[Pixels], Tensor]) -> Logits:
    """Image tokens put among word embeddings, then the decoder."""
    marker = FAMILIES[config["model_type"]].image_id(config)
    kept: dict[int, Tensor] = {}

    def logits(ids: list[int], picture: Pixels) -> Tensor:
        with torch.no_grad():
            if id(picture) not in kept:
                kept.clear()
                kept[id(picture)] = image(picture)
            tensor = torch.tensor([ids])
            at = tensor == marker
            x = decoder.get_input_embeddings()(tensor.masked_fill(at, 0))
            x = x.masked_scatter(at[..., None], kept[id(picture)])
            out: Tensor = decoder(inputs_embeds=x).logits[0]
        return out

    return logits


def _inner(tower: nn.Module) -> str:
    """What transformers' own names begin with, which differs between its versions."""
    return "vision_model." if any(n.startswith("vision_model.") for n in tower.state_dict()) else ""


def _below(weights: Weights, at: str, new: str) -> dict[str, Tensor]:
    return {new + k.removeprefix(at): v for k, v in weights.items() if k.startswith(at)}


def _load(model: Any, weights: Weights) -> None:
    """Load all of it, in fp32, for inference."""
    model.float()
    found = model.load_state_dict(dict(weights), strict=False)
    left = [n for n in found.missing_keys if "position_ids" not in n]
    if left or found.unexpected_keys:
        raise ValueError(f"zoo: oracle: missing {left}, not wanted {found.unexpected_keys}")
    model.eval()


def _normalised(picture: Pixels, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """[G, 3, S, S] from uint8."""
    x = torch.tensor(picture.values).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
