"""MobileVLM and OmniVLM as transformers' towers and decoders around independent projectors.

There is no class of transformers for either. Nothing here comes from `lorgnette`: weights are read
with the libraries of their formats, and the projectors are those of `tests.projector_oracle`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
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
)

from tests import projector_oracle

Weights = dict[str, Tensor]
MOBILEVLM_TOWER = "model.vision_tower.vision_tower.vision_model."
OMNIVLM_TOWER = "vision_tower.vision_model."
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ComposedOracle:
    """A vision-language model put together from a tower, a projector and a decoder.

    Args:
        features: Normalised pixels `[G, 3, edge, edge]` to patch features `[G, P, D]`.
        project: Features to image tokens `[G, N, D]`.
        decoder: A causal language model.
        image_id: The id whose places image tokens take.
        mean: Subtracted from pixels in 0..1.
        std: Divided by then.
    """

    def __init__(
        self,
        features: Callable[[Tensor], Tensor],
        project: Callable[[Tensor], Tensor],
        decoder: Any,
        image_id: int,
        mean: tuple[float, ...] = (0.5,) * 3,
        std: tuple[float, ...] = (0.5,) * 3,
    ) -> None:
        self.features, self.project, self.decoder = features, project, decoder
        self.image_id = image_id
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)

    @torch.no_grad()
    def encode(self, tiles: NDArray[Any]) -> Tensor:
        pixels = (torch.from_numpy(tiles).float() / 255 - self.mean) / self.std
        return self.project(self.features(pixels))

    @torch.no_grad()
    def splice(self, ids: list[int], tiles: NDArray[Any] | None) -> Tensor:
        tensor = torch.tensor([ids])
        at = tensor == self.image_id
        x: Tensor = self.decoder.get_input_embeddings()(tensor)
        return x if tiles is None else x.masked_scatter(at[..., None], self.encode(tiles))

    @torch.no_grad()
    def logits(self, ids: list[int], tiles: NDArray[Any] | None = None) -> Tensor:
        out: Tensor = self.decoder(inputs_embeds=self.splice(ids, tiles)).logits[0]
        return out

    @torch.no_grad()
    def greedy(self, ids: list[int], tiles: NDArray[Any], steps: int) -> list[int]:
        out = self.decoder(inputs_embeds=self.splice(ids, tiles), use_cache=True)
        found = [int(out.logits[0, -1].argmax())]
        while len(found) < steps:
            out = self.decoder(
                input_ids=torch.tensor([found[-1:]]),
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            found.append(int(out.logits[0, -1].argmax()))
        return found


def mobilevlm_oracle(
    config: Mapping[str, Any], clip: Mapping[str, Any], weights: Weights
) -> ComposedOracle:
    """MobileVLM of either version; `weights` by their published names."""
    tower = _loaded(CLIPVisionModel, CLIPVisionConfig(**clip), weights, MOBILEVLM_TOWER)
    sizes = {k: v for k, v in config.items() if not k.startswith("mm_") and k != "model_type"}
    parts = ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")
    text = {n: w for n, w in weights.items() if n.startswith(parts) and "inv_freq" not in n}
    decoder = _loaded(LlamaForCausalLM, LlamaConfig(**sizes), text, "")
    project = {"ldpnet": projector_oracle.ldp, "ldpnetv2": projector_oracle.ldp_v2}[
        config["mm_projector_type"]
    ]
    projector = {n: w.float() for n, w in weights.items() if ".mm_projector." in n}

    def features(pixels: Tensor) -> Tensor:
        states = tower(pixel_values=pixels, output_hidden_states=True).hidden_states
        found: Tensor = states[config["mm_vision_select_layer"]][:, 1:]
        return found

    return ComposedOracle(
        features, lambda x: project(projector, x), decoder, 0, CLIP_MEAN, CLIP_STD
    )


def omnivlm_oracle(config: Mapping[str, Any], weights: Weights) -> ComposedOracle:
    """OmniVLM with any number of patches to a token; `weights` by names of the normal form."""
    vision = SiglipVisionConfig(**config["vision_config"] | {"vision_use_head": False})
    tower = _loaded(
        SiglipVisionModel,
        vision,
        {n: w for n, w in weights.items() if not n.startswith(f"{OMNIVLM_TOWER}head.")},
        OMNIVLM_TOWER,
    )
    text = {
        n.removeprefix("language_model."): w
        for n, w in weights.items()
        if n.startswith("language_model.")
    }
    tied = config["tie_word_embeddings"]
    if tied:
        text["lm_head.weight"] = text["model.embed_tokens.weight"]
    # Its own copy of the flag would be false where the config leaves it to the top level.
    sizes = dict(config["text_config"]) | {"tie_word_embeddings": tied}
    decoder = _loaded(Qwen2ForCausalLM, Qwen2Config(**sizes), text, "")
    projector = {n: w.float() for n, w in weights.items() if n.startswith("multi_modal")}
    return ComposedOracle(
        lambda pixels: tower(pixel_values=pixels).last_hidden_state,
        lambda x: projector_oracle.omnivlm(projector, x, config["projector_group"]),
        decoder,
        config["image_token_id"],
    )


def read_weights(folder: Path) -> Weights:
    """Every tensor of a directory, with the library of its format."""
    found: Weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    for file in sorted(folder.glob("*.bin")):
        found |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return found


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object."""
    values: dict[str, Any] = json.loads(file.read_text())
    return values


def _loaded(kind: Any, config: Any, weights: Weights, prefix: str) -> Any:
    """A transformers model in float32 with the weights below a prefix, all of them used."""
    with torch.device("meta"):
        model: nn.Module = kind(config)
    inner = "vision_model." if prefix and _has_inner(model) else ""
    state = {
        inner + n.removeprefix(prefix): w.float()
        for n, w in weights.items()
        if n.startswith(prefix)
    }
    # Buffers are made anew off the meta device: no checkpoint has them.
    fresh = kind(_without_layers(config))
    buffers = dict(fresh.named_buffers())
    found = model.load_state_dict(state, strict=False, assign=True)
    if found.missing_keys or found.unexpected_keys:
        raise ValueError(f"missing {found.missing_keys}, unexpected {found.unexpected_keys}")
    for name, value in buffers.items():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, value)
    return model.eval().requires_grad_(False)


def _without_layers(config: Any) -> Any:
    values = config.to_dict() | {"num_hidden_layers": 1, "layer_types": None}
    return type(config)(**{k: v for k, v in values.items() if v is not None})


def _has_inner(model: nn.Module) -> bool:
    """Whether names begin with `vision_model.`, which differs between versions."""
    return any(name.startswith("vision_model.") for name in model.state_dict())
