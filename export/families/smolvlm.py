"""SmolVLM and SmolVLM2: SigLIP tower, pixel shuffle, LLaMA decoder.

Published as model types `idefics3` (v1) and `smolvlm` (v2), which compute the same thing.
Source: Marafioti et al. 2025, arXiv:2504.05299; transformers 5.23 `idefics3` and `smolvlm`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial

import torch

from lorgnette.errors import CheckpointError, ConfigError
from lorgnette.export.chat_template import compile_chat_template
from lorgnette.export.checkpoint import Checkpoint
from lorgnette.export.component import (
    Component,
    decoder_component,
    embedding_component,
    vision_component,
)
from lorgnette.export.config import ConfigReader
from lorgnette.export.layers.decoder import llama_rules
from lorgnette.export.layers.projectors import PixelShuffleProjector
from lorgnette.export.layers.vision import SiglipTower, siglip_rules
from lorgnette.export.picture_size import choose_tiling
from lorgnette.export.spec_readers import (
    LLAMA,
    VisionDefaults,
    check_sizes,
    read_chat_template,
    read_decoder,
    read_pixel_range,
    read_resample,
    read_stop_ids,
    read_vision,
)
from lorgnette.recipe import Recipe
from lorgnette.spec import (
    ImageTemplate,
    ModelSpec,
    Preprocess,
    ProjectorSpec,
    PromptSpec,
    TextSpec,
    TilePreprocess,
    VisionSpec,
)

MODEL_TYPES = ("idefics3", "smolvlm")
GGUF_ARCHITECTURES: tuple[str, ...] = ()

IGNORED_TENSORS: Mapping[str, str] = {
    r"model\.text_model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "computed anew",
    r"model\.vision_model\.embeddings\.position_ids": "always the identity here",
    r"lm_head\.weight": "the embedding again, where the config ties them; otherwise it is read",
}

VISION_TYPES = ("idefics3", "idefics3_vision", "smolvlm_vision", "siglip_vision_model")
IDEFICS3_VISION = VisionDefaults(1152, 3072, 12, 16, 224, 32, 1e-6)
VARIANTS = {(576, 30): "256M", (960, 32): "500M", (2048, 24): "2.2B"}  # by width and layers
HEAD, EMBEDDING = "lm_head.weight", "model.text_model.embed_tokens.weight"
FAKE, GLOBAL, IMAGE = "<fake_token_around_image>", "<global-img>", "<image>"


def normal_form(checkpoint: Checkpoint, vision: Checkpoint | None) -> Checkpoint:
    """The checkpoint as it is: it is published in one piece."""
    if vision is not None:
        raise CheckpointError(
            "SmolVLM's vision tower is part of its checkpoint",
            where=vision.path,
            hint="leave --vision out",
        )
    return checkpoint


def parse(checkpoint: Checkpoint) -> ModelSpec:
    """Reads config.json; a missing key means the default of the transformers class."""
    config = ConfigReader(checkpoint.config, str(checkpoint.path / "config.json"))
    model_type = config.choice("model_type", *MODEL_TYPES)
    config.ignore(
        {
            "image_seq_len": "follows from the sizes",
            "perceiver_config": "unused by every published checkpoint (use_resampler false)",
            "neftune_noise_alpha": "training only",
        }
    )
    config.fixed("use_resampler", False)
    config.fixed("qk_layer_norms", False)
    text = _parse_text(
        config.section("text_config"),
        # The defaults of SmolVLMConfig as a whole differ from LlamaConfig's in this one.
        norm_eps=1e-6 if config.has("text_config") else 1e-5,
        tied=config.flag("tie_word_embeddings", False) and not _has_own_head(checkpoint),
    )
    spec = ModelSpec(
        family="smolvlm",
        model_type=model_type,
        variant=VARIANTS.get((text.hidden_size, text.layers), "custom"),
        vision=_parse_vision(config.section("vision_config")),
        text=text,
        projector=ProjectorSpec(
            kind="pixel_shuffle",
            patches_per_token=config.integer("scale_factor", 2, most=16) ** 2,
        ),
        image_token_id=config.token_id("image_token_id", 128257),
    )
    config.finish()
    check_sizes(spec, config.where)
    if spec.vision.grid % _scale(spec):
        raise ConfigError(
            "sizes do not fit: patch grid not divisible by scale_factor",
            where=config.where,
            got=spec.vision.grid,
        )
    return spec


def _has_own_head(checkpoint: Checkpoint) -> bool:
    """Whether a head is stored that is not the embedding: it counts, whatever the config says.

    Source: transformers 5.23, `PreTrainedModel.tie_weights`.
    """
    if not {HEAD, EMBEDDING} <= checkpoint.tensors.keys():
        return False
    return not torch.equal(checkpoint.read(HEAD), checkpoint.read(EMBEDDING))


def _parse_vision(vision: ConfigReader) -> VisionSpec:
    vision.fixed("model_type", *VISION_TYPES)
    vision.ignore(
        {
            "max_image_size": "the preprocessor config decides",
            "size": "the preprocessor config decides",
            "use_base_siglip": "the sizes say it",
            "tie_word_embeddings": "the tower has none",
        }
    )
    spec = read_vision(vision, IDEFICS3_VISION, "gelu_pytorch_tanh")
    vision.finish()
    return spec


def _parse_text(text: ConfigReader, *, norm_eps: float, tied: bool) -> TextSpec:
    text.fixed("model_type", "llama")
    text.fixed("attention_bias", False)
    text.fixed("mlp_bias", False)
    text.fixed("qk_layer_norms", False)
    text.fixed("use_resampler", False)
    text.ignore(
        {
            "tie_word_embeddings": "only the top-level key counts",
            "pixel_shuffle_factor": "scale_factor counts",
            "perceiver_config": "unused (use_resampler false)",
            "neftune_noise_alpha": "training only",
            "is_llama_config": "bookkeeping",
        }
    )
    defaults = dataclasses.replace(LLAMA, norm_eps=norm_eps)
    spec = read_decoder(text, defaults, tied=tied, qkv_bias=False)
    text.finish()
    return spec


def _scale(spec: ModelSpec) -> int:
    """Patches along a side of the block that becomes one image token."""
    return math.isqrt(spec.projector.patches_per_token)


def preprocess(checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe) -> Preprocess:
    """Reads preprocessor_config.json, or the part of processor_config.json that replaced it."""
    return choose_tiling(_published_preprocess(checkpoint, spec), recipe)


def _published_preprocess(checkpoint: Checkpoint, spec: ModelSpec) -> TilePreprocess:
    name = "preprocessor_config.json"
    values = checkpoint.json(name)
    if values is None:
        name = "processor_config.json"
        values = (checkpoint.json(name) or {}).get("image_processor")
    if not isinstance(values, dict):
        raise CheckpointError("file is missing", where=checkpoint.path / "preprocessor_config.json")
    config = ConfigReader(values, str(checkpoint.path / name))
    rescale, mean, std = read_pixel_range(config, [0.5] * 3, [0.5] * 3)
    config.ignore(
        {
            "do_pad": "tiles are never padded here",
            "image_processor_type": "names a class",
            "processor_class": "names a class",
            "feature_extractor_type": "names a class",
            "video_sampling": "pictures only",
            "video_sampling_v2": "pictures only",
            "processor_config": "follows from the sizes",
            "image_seq_len": "follows from the sizes",
            "input_data_format": "fixed here",
            "data_format": "fixed here",
            "return_row_col_info": "the prompt decides",
            "default_to_square": "sizes are exact here",
            "device": "run-time switch",
            "disable_grouping": "run-time switch",
            "return_tensors": "run-time switch",
        }
    )
    size = config.section("size")
    tile = config.section("max_image_size")
    result = TilePreprocess(
        tile_size=tile.integer("longest_edge", 364, most=8192),
        longest_edge=size.integer("longest_edge", 1456, most=4096),
        split=config.flag("do_image_splitting", True),
        resample=read_resample(config, 1),
        rescale=rescale,
        mean=mean,
        std=std,
    )
    config.finish()
    if result.tile_size != spec.vision.image_size:
        raise ConfigError(
            "tile size is not the image size of the vision tower",
            where=config.where,
            got=result.tile_size,
            wanted=spec.vision.image_size,
        )
    return result


def prompt(checkpoint: Checkpoint, spec: ModelSpec, tokens: Mapping[str, int]) -> PromptSpec:
    """Compiles the chat template and the text that a picture becomes."""
    if tokens.get(IMAGE) != spec.image_token_id:
        raise ConfigError(
            f"image_token_id is not the id of '{IMAGE}' in the tokenizer",
            where=checkpoint.path / "config.json",
            got=spec.image_token_id,
            wanted=tokens.get(IMAGE, f"a tokenizer with '{IMAGE}'"),
        )
    if FAKE not in tokens:
        raise ConfigError(f"the tokenizer lacks '{FAKE}'", where=checkpoint.path / "tokenizer.json")
    template, where = read_chat_template(checkpoint)
    compiled = compile_chat_template(template, IMAGE, where=where)
    single = f"{FAKE}{GLOBAL}{{image}}{FAKE}"
    return PromptSpec(
        prefix=compiled.prefix,
        turns=compiled.turns,
        generation=compiled.generation,
        image=ImageTemplate(
            image_token=IMAGE,
            tokens_per_tile=spec.image_tokens_per_tile,
            tile=f"{FAKE}<row_{{row}}_col_{{col}}>{{image}}",
            row_end="\n",
            thumbnail=f"\n{single}",
            single=single,
        ),
        stop_token_ids=read_stop_ids(checkpoint, spec),
    )


def components(
    spec: ModelSpec, preprocess: Preprocess, context_length: int
) -> tuple[Component, ...]:
    """Vision encoder with projector, token embedding, decoder."""
    vision, text = spec.vision, spec.text
    tower = "model.vision_model."
    rules = siglip_rules(
        tower, vision, rescale=preprocess.rescale, mean=preprocess.mean, std=preprocess.std
    ) | {"projector.projection": "model.connector.modality_projection.proj"}
    head = EMBEDDING if text.tied_embeddings else HEAD
    return (
        vision_component(
            spec,
            partial(SiglipTower, vision),
            partial(
                PixelShuffleProjector,
                vision.hidden_size,
                text.hidden_size,
                vision.grid,
                _scale(spec),
            ),
            rules,
        ),
        embedding_component(spec, context_length, EMBEDDING.removesuffix(".weight")),
        decoder_component(
            spec,
            context_length,
            llama_rules("model.text_model.", head.removesuffix(".weight"), text, context_length),
        ),
    )
