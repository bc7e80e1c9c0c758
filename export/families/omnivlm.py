"""OmniVLM (omnivision-968M) and nano-vlm-instruct: SigLIP tower, joined patches, Qwen2 decoder.

Published as two GGUF files, a language model and a vision tower (mmproj), and read from them or
from this project's normal form: a directory with config.json and safetensors.
Source: Chen et al. 2024, arXiv:2412.11475; NexaAI's fork of llama.cpp, `examples/omni-vlm`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from lorgnette.errors import CheckpointError, ConfigError
from lorgnette.export.checkpoint import Checkpoint, combine
from lorgnette.export.component import (
    Component,
    decoder_component,
    embedding_component,
    vision_component,
)
from lorgnette.export.config import ConfigReader
from lorgnette.export.gguf_import import (
    GgufKeys,
    is_gguf,
    matrix_shape,
    qwen2_config,
    qwen2_names,
    siglip_config,
    siglip_names,
    siglip_preprocessor,
    token_id,
)
from lorgnette.export.layers.decoder import llama_rules
from lorgnette.export.layers.projectors import ConcatProjector, concat_rules
from lorgnette.export.layers.vision import SiglipTower, siglip_rules
from lorgnette.export.picture_size import keep_square
from lorgnette.export.spec_readers import (
    QWEN2,
    SIGLIP,
    check_sizes,
    read_decoder,
    read_pixel_range,
    read_resample,
    read_stop_ids,
    read_vision,
)
from lorgnette.export.tokenizer_files import gguf_tokenizer_json
from lorgnette.recipe import Recipe
from lorgnette.spec import (
    ImageTemplate,
    ModelSpec,
    Preprocess,
    ProjectorSpec,
    PromptSpec,
    SquarePreprocess,
    TurnTemplate,
)

MODEL_TYPES = ("omnivlm",)
GGUF_ARCHITECTURES = ("siglip",)
IGNORED_TENSORS: Mapping[str, str] = {
    r"vision_tower\.vision_model\.head\..*": "pools to one vector, which no image token is",
    r"vision_tower\.vision_model\.embeddings\.position_ids": "counts up",
    r"language_model\.lm_head\.weight": "the embedding again, where the config ties them",
}
VARIANTS = {9: "968M", 1: "nano-vlm-instruct"}  # by patches of an image token
IMAGE = "<|image_pad|>"
START, END, EOT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SYSTEM = "You are Nano-Omni-VLM, created by Nexa AI. You are a helpful assistant."


def normal_form(checkpoint: Checkpoint, vision: Checkpoint | None) -> Checkpoint:
    """A directory as it is, or a pair of GGUF files as if it were one."""
    if vision is None and not is_gguf(checkpoint):
        return checkpoint
    if vision is None or not is_gguf(checkpoint):
        raise CheckpointError(
            "OmniVLM is one directory, or two GGUF files",
            where=checkpoint.path,
            got="a directory and a vision tower" if vision else "a language model alone",
            hint="leave --vision out" if vision else "--vision FILE names the mmproj file",
        )
    tower = "vision_tower.vision_model."
    tensors = {
        **{name: (checkpoint, old) for name, old in qwen2_names(checkpoint, "language_model.")},
        **{name: (vision, old) for name, old in siglip_names(vision, tower)},
        **{
            f"multi_modal_projector.{old.removeprefix('mm.')}": (vision, old)
            for old in vision.tensors
            if old.startswith("mm.")
        },
    }
    config = _gguf_config(checkpoint, vision)
    stop = checkpoint.config.get("tokenizer.ggml.eos_token_id")
    files = {
        "preprocessor_config.json": json.dumps(siglip_preprocessor(vision)).encode(),
        "generation_config.json": json.dumps({"eos_token_id": stop}).encode(),
        "tokenizer.json": gguf_tokenizer_json(checkpoint),
    }
    return combine(checkpoint, tensors, config=config, files=files)


def _gguf_config(decoder: Checkpoint, tower: Checkpoint) -> dict[str, Any]:
    """config.json of the normal form.

    Raises:
        CheckpointError: The two files are not OmniVLM's, or not of one model.
    """
    text, vision = qwen2_config(decoder), siglip_config(tower)
    if not GgufKeys(tower, "siglip").flag("has_omni_vlm_projector"):
        raise CheckpointError(
            "the mmproj file has another projector than OmniVLM's",
            where=tower.path,
            got="siglip.has_omni_vlm_projector is not true",
        )
    hidden, joined = matrix_shape(tower, "mm.0.weight")
    projected, _ = matrix_shape(tower, "mm.2.weight")
    if projected != text["hidden_size"]:
        raise CheckpointError(
            "the mmproj file does not fit the language model: rows of mm.2.weight",
            where=tower.path,
            got=projected,
            wanted=f"{text['hidden_size']}, the embedding length of {decoder.path.name}",
        )
    if joined % vision["hidden_size"]:
        raise CheckpointError(
            "columns of mm.0.weight are no multiple of the tower's width",
            where=tower.path,
            got=joined,
            wanted=f"a multiple of {vision['hidden_size']}",
        )
    return {
        "model_type": "omnivlm",
        "image_token_id": token_id(decoder, IMAGE),
        "projector_group": joined // vision["hidden_size"],
        "projector_hidden_size": hidden,
        "tie_word_embeddings": "output.weight" not in decoder.tensors,
        "vision_config": vision,
        "text_config": text,
    }


def parse(checkpoint: Checkpoint) -> ModelSpec:
    """Reads config.json of the normal form; a missing key means the transformers default."""
    config = ConfigReader(checkpoint.config, str(checkpoint.place("config.json")))
    model_type = config.choice("model_type", *MODEL_TYPES)
    vision_config = config.section("vision_config")
    vision_config.fixed("model_type", "siglip_vision_model")
    vision_config.ignore(
        {
            "vision_use_head": "the pooled vector is unused",
            "projection_dim": "the projector's weights say it",
        }
    )
    vision = read_vision(vision_config, SIGLIP, "gelu_pytorch_tanh")
    vision_config.finish()
    text_config = config.section("text_config")
    text_config.fixed("model_type", "qwen2")
    text_config.fixed("use_sliding_window", False)
    text_config.ignore(
        {
            "sliding_window": "unused (use_sliding_window false)",
            "max_window_layers": "unused (use_sliding_window false)",
            "layer_types": "all full attention (use_sliding_window false)",
            "tie_word_embeddings": "the top-level key counts",
        }
    )
    text = read_decoder(
        text_config, QWEN2, tied=config.flag("tie_word_embeddings", True), qkv_bias=True
    )
    text_config.finish()
    group = config.integer("projector_group", 9, most=1024)
    published = (text.hidden_size, text.layers) == (896, 24)
    spec = ModelSpec(
        family="omnivlm",
        model_type=model_type,
        variant=VARIANTS.get(group, "custom") if published else "custom",
        vision=vision,
        text=text,
        projector=ProjectorSpec(
            kind="concat_mlp",
            patches_per_token=group,
            hidden_size=config.integer("projector_hidden_size", 4096),
        ),
        image_token_id=config.token_id("image_token_id", 151655),
    )
    config.finish()
    check_sizes(spec, config.where)
    if vision.grid**2 % group:
        raise ConfigError(
            "sizes do not fit: patches not divisible by projector_group",
            where=config.where,
            got=vision.grid**2,
        )
    return spec


def preprocess(checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe) -> Preprocess:
    """The picture stretched to a square; preprocessor_config.json may name other numbers."""
    name = "preprocessor_config.json"
    config = ConfigReader(checkpoint.json(name) or {}, str(checkpoint.place(name)))
    config.ignore(
        {
            "image_processor_type": "names a class",
            "processor_class": "names a class",
        }
    )
    rescale, mean, std = read_pixel_range(config, [0.5] * 3, [0.5] * 3)
    size = config.section("size")
    for key in ("height", "width"):
        edge = size.integer(key, spec.vision.image_size)
        if edge != spec.vision.image_size:
            raise ConfigError(
                f"{key} is not the image size of the vision tower",
                where=size.where,
                got=edge,
                wanted=spec.vision.image_size,
            )
    size.finish()
    published = SquarePreprocess(
        tile_size=spec.vision.image_size,
        fit="stretch",
        background=(0, 0, 0),
        resample=read_resample(config, 3),
        rescale=rescale,
        mean=mean,
        std=std,
    )
    config.finish()
    return keep_square(published, recipe)


def prompt(checkpoint: Checkpoint, spec: ModelSpec, tokens: Mapping[str, int]) -> PromptSpec:
    """The prompt of the original program, which leaves the answer's header to the model."""
    if tokens.get(IMAGE) != spec.image_token_id:
        raise ConfigError(
            f"image_token_id is not the id of '{IMAGE}' in the tokenizer",
            where=checkpoint.path,
            got=spec.image_token_id,
            wanted=tokens.get(IMAGE, f"a tokenizer with '{IMAGE}'"),
        )
    for token in (START, END):
        if token not in tokens:
            raise ConfigError("the tokenizer lacks a token", where=checkpoint.path, wanted=token)
    stops = {tokens[END], *read_stop_ids(checkpoint, spec)}
    if EOT in tokens:
        stops.add(tokens[EOT])

    def turn(role: str, footer: str) -> TurnTemplate:
        header = f"{START}{role}\n"
        return TurnTemplate(header=header, header_image_first=header, footer=footer)

    return PromptSpec(
        prefix="",
        turns={
            "system": turn("system", f"{END}\n"),
            "user": turn("user", END),
            "assistant": turn("assistant", f"{END}\n"),
        },
        generation="",
        image=ImageTemplate(
            image_token=IMAGE,
            tokens_per_tile=spec.image_tokens_per_tile,
            tile="",
            row_end="",
            thumbnail="",
            single="\n<|vision_start|>{image}<|vision_end|>",
        ),
        stop_token_ids=tuple(sorted(stops)),
        default_system=SYSTEM,
        answer_header=f"{START}assistant",
        tasks={"ocr": " <|ocr_start|><|vision_start|>{image}<|vision_end|><|ocr_end|>"},
    )


def components(
    spec: ModelSpec, preprocess: Preprocess, context_length: int
) -> tuple[Component, ...]:
    """Vision encoder with projector, token embedding, decoder."""
    vision, text, projector = spec.vision, spec.text, spec.projector
    tower = siglip_rules(
        "vision_tower.vision_model.",
        vision,
        rescale=preprocess.rescale,
        mean=preprocess.mean,
        std=preprocess.std,
    )
    embedding = "language_model.model.embed_tokens"
    head = embedding if text.tied_embeddings else "language_model.lm_head"
    return (
        vision_component(
            spec,
            partial(SiglipTower, vision),
            partial(
                ConcatProjector,
                vision.hidden_size,
                projector.hidden_size or 1,
                text.hidden_size,
                projector.patches_per_token,
            ),
            tower | concat_rules("multi_modal_projector."),
        ),
        embedding_component(spec, context_length, embedding),
        decoder_component(
            spec, context_length, llama_rules("language_model.model.", head, text, context_length)
        ),
    )
