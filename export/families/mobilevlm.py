"""MobileVLM v1 and V2: CLIP tower, lightweight downsample projector, LLaMA decoder.

Source: Chu et al. 2023, arXiv:2312.16886 (v1) and 2024, arXiv:2402.03766 (V2); the public
repository Meituan-AutoML/MobileVLM.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from lorgnette.errors import CheckpointError, ConfigError
from lorgnette.export.checkpoint import Checkpoint, combine
from lorgnette.export.component import (
    Component,
    decoder_component,
    embedding_component,
    vision_component,
)
from lorgnette.export.config import ConfigReader
from lorgnette.export.layers.decoder import llama_rules
from lorgnette.export.layers.projectors import (
    LdpProjector,
    LdpV2Projector,
    ldp_rules,
    ldpv2_rules,
)
from lorgnette.export.layers.vision import ClipTower, clip_rules
from lorgnette.export.picture_size import keep_square
from lorgnette.export.spec_readers import (
    CLIP,
    LLAMA,
    check_sizes,
    read_decoder,
    read_pixel_range,
    read_resample,
    read_stop_ids,
    read_vision,
)
from lorgnette.export.weights import Rule
from lorgnette.recipe import Recipe
from lorgnette.spec import (
    ImageTemplate,
    ModelSpec,
    Preprocess,
    ProjectorSpec,
    PromptSpec,
    SquarePreprocess,
    TurnTemplate,
    VisionSpec,
)

MODEL_TYPES = ("mobilevlm",)
GGUF_ARCHITECTURES: tuple[str, ...] = ()
TOWER = "model.vision_tower.vision_tower.vision_model."
IGNORED_TENSORS: Mapping[str, str] = {
    rf"{re.escape(TOWER)}encoder\.layers\.\d+\..*": "the last layer: features are taken before it",
    rf"{re.escape(TOWER)}post_layernorm\..*": "follows the last layer",
    rf"{re.escape(TOWER)}embeddings\.position_ids": "counts up",
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "computed anew",
}

PROJECTORS = {"ldpnet": ("ldp", "v1"), "ldpnetv2": ("ldpv2", "V2")}
SIZES = {(2048, 24): "1.7B", (2560, 32): "3B", (4096, 32): "7B"}  # by width and layers
TOWER_FOLDER = "vision_tower"
CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
PRESETS: Mapping[str, Mapping[str, Any]] = {"openai/clip-vit-large-patch14-336": CLIP_L_336}
"""Towers that a published config only names: no MobileVLM checkpoint holds their config."""

MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
UNKNOWN = "<unk>"
"""Stands for an image token: no text has it, and it parts the text before from the text behind,
which the original tokenises apart, each with LLaMA's space in front."""
UNKNOWN_ID = 0
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)


def normal_form(checkpoint: Checkpoint, vision: Checkpoint | None) -> Checkpoint:
    """The checkpoint, or one whose vision tower is a CLIP model published apart.

    The original code of v1 loads CLIP anew, whatever its checkpoint holds; that of V2 takes the
    tuned tower of the checkpoint.
    """
    if vision is None:
        return checkpoint
    config = vision.config
    if config.get("model_type") == "clip":
        config = config.get("vision_config", {}) | {"model_type": "clip_vision_model"}
    if config.get("model_type") != "clip_vision_model":
        raise CheckpointError(
            "the vision tower is not CLIP's",
            where=vision.path / "config.json",
            got=repr(config.get("model_type")),
            wanted="'clip' or 'clip_vision_model'",
        )
    tensors = {name: (checkpoint, name) for name in checkpoint.tensors}
    tensors = {name: at for name, at in tensors.items() if not name.startswith(TOWER)}
    for name in vision.tensors:
        if name.startswith("vision_model."):
            tensors[TOWER + name.removeprefix("vision_model.")] = (vision, name)
    files = {f"{TOWER_FOLDER}/config.json": json.dumps(dict(config)).encode()}
    preprocessor = vision.data("preprocessor_config.json")
    if preprocessor is not None:
        files[f"{TOWER_FOLDER}/preprocessor_config.json"] = preprocessor
    return combine(
        checkpoint,
        tensors,
        config={**checkpoint.config, "mm_vision_tower": TOWER_FOLDER},
        files=files,
    )


def parse(checkpoint: Checkpoint) -> ModelSpec:
    """Reads config.json and the tower's; a missing key means LlamaConfig's default."""
    config = ConfigReader(checkpoint.config, str(checkpoint.path / "config.json"))
    model_type = config.choice("model_type", *MODEL_TYPES)
    config.choice("image_aspect_ratio", "pad")
    config.fixed("mm_vision_select_layer", -2)
    config.fixed("mm_vision_select_feature", "patch")
    config.fixed("vision_tower_type", "clip")
    config.fixed("use_mm_proj", True)
    for key in ("mm_use_im_start_end", "mm_use_im_patch_token", "attention_bias", "mlp_bias"):
        config.fixed(key, False)
    config.ignore(
        {
            "image_grid_pinpoints": "for another image_aspect_ratio",
            "mm_vision_tower": "read by _tower_config",
            "max_sequence_length": "max_position_embeddings counts",
            "mm_projector_lr": "training only",
            "freeze_mm_mlp_adapter": "training only",
            "tune_mm_mlp_adapter": "training only",
        }
    )
    kind, version = PROJECTORS[config.choice("mm_projector_type", *PROJECTORS)]
    vision = _parse_vision(checkpoint)
    text = read_decoder(
        config, LLAMA, tied=config.flag("tie_word_embeddings", False), qkv_bias=False
    )
    size = SIZES.get((text.hidden_size, text.layers))
    spec = ModelSpec(
        family="mobilevlm",
        model_type=model_type,
        variant=f"{version} {size or 'custom'}",
        vision=vision,
        text=text,
        projector=ProjectorSpec(kind=kind, patches_per_token=4),  # type: ignore[arg-type]
        image_token_id=UNKNOWN_ID,
    )
    width = config.integer("mm_hidden_size", vision.hidden_size)
    config.finish()
    check_sizes(spec, config.where)
    for what, got, fits in (
        ("mm_hidden_size is not the width of the vision tower", width, width == vision.hidden_size),
        ("patch grid is odd", vision.grid, vision.grid % 2 == 0),
    ):
        if not fits:
            raise ConfigError(f"sizes do not fit: {what}", where=config.where, got=got)
    return spec


def _parse_vision(checkpoint: Checkpoint) -> VisionSpec:
    """The tower without its last layer, behind which nothing is read."""
    values, where = _tower_config(checkpoint)
    config = ConfigReader(values, where)
    config.fixed("model_type", "clip_vision_model")
    config.ignore(
        {
            "projection_dim": "the tower's own projection is unused",
            "initializer_factor": "training only",
            "dropout": "training only",
        }
    )
    published = read_vision(config, CLIP, "quick_gelu")
    config.finish()
    if published.layers < 2:
        raise ConfigError("the vision tower has one layer", where=where, wanted="2 or more")
    if f"{TOWER}encoder.layers.{published.layers}.layer_norm1.weight" in checkpoint.tensors:
        raise CheckpointError(
            "the checkpoint's vision tower has more layers than its config says",
            where=checkpoint.path,
            wanted=published.layers,
        )
    return VisionSpec(**{**_fields(published), "layers": published.layers - 1})


def _fields(vision: VisionSpec) -> dict[str, Any]:
    return {name: getattr(vision, name) for name in vision.__struct_fields__}


def _tower_config(checkpoint: Checkpoint) -> tuple[Mapping[str, Any], str]:
    """The config of the tower: of the folder that the checkpoint names, or a known one."""
    name = str(checkpoint.config.get("mm_vision_tower"))
    if name in PRESETS:
        return PRESETS[name], f"preset {name}"
    inside = re.fullmatch(r"\w[\w-]{0,60}", name)  # longer ones are no name on some systems
    values = checkpoint.json(f"{name}/config.json") if inside else None
    if values is None:
        raise ConfigError(
            "the vision tower is not known",
            where=checkpoint.path / "config.json",
            got=f"mm_vision_tower {name}",
            wanted=f"{' or '.join(PRESETS)}, or a folder inside the checkpoint with a config.json",
            hint="--vision DIR takes the tower of a CLIP checkpoint",
        )
    return values, str(checkpoint.path / name / "config.json")


def preprocess(checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe) -> Preprocess:
    """CLIP's preprocessing of the picture padded to a square with CLIP's mean colour."""
    folder = checkpoint.config["mm_vision_tower"]
    name = f"{folder}/preprocessor_config.json"
    values = (checkpoint.json(name) if folder not in PRESETS else None) or {}
    config = ConfigReader(values, str(checkpoint.path / name))
    config.ignore(
        {
            "image_processor_type": "names a class",
            "feature_extractor_type": "names a class",
            "processor_class": "names a class",
            "do_center_crop": "a square is cropped to itself",
        }
    )
    rescale, mean, std = read_pixel_range(config, MEAN, STD)
    for key, side in (("size", "shortest_edge"), ("crop_size", "height"), ("crop_size", "width")):
        value = values.get(key, spec.vision.image_size)
        edge = value.get(side) if isinstance(value, dict) else value
        config.ignore({key: "read here"})
        if edge != spec.vision.image_size:
            raise ConfigError(
                f"'{key}' is not the image size of the vision tower",
                where=config.where,
                got=edge,
                wanted=spec.vision.image_size,
            )
    published = SquarePreprocess(
        tile_size=spec.vision.image_size,
        fit="pad",
        background=(int(mean[0] * 255), int(mean[1] * 255), int(mean[2] * 255)),
        resample=read_resample(config, 3),
        rescale=rescale,
        mean=mean,
        std=std,
    )
    config.finish()
    return keep_square(published, recipe)


def prompt(checkpoint: Checkpoint, spec: ModelSpec, tokens: Mapping[str, int]) -> PromptSpec:
    """Vicuna's conversation, as the original code writes it out."""
    for token in (UNKNOWN, "<s>", "</s>"):
        if token not in tokens:
            raise ConfigError("the tokenizer lacks a token", where=checkpoint.path, wanted=token)
    if tokens[UNKNOWN] != UNKNOWN_ID:
        raise ConfigError(
            f"'{UNKNOWN}' has another id than LLaMA's",
            where=checkpoint.path,
            got=tokens[UNKNOWN],
            wanted=UNKNOWN_ID,
        )
    user = TurnTemplate(header="USER: ", header_image_first="USER: ", footer=" ")
    assistant = TurnTemplate(header="ASSISTANT: ", header_image_first="ASSISTANT: ", footer="</s>")
    system = TurnTemplate(header="", header_image_first="", footer=" ")
    return PromptSpec(
        prefix="<s>",
        turns={"system": system, "user": user, "assistant": assistant},
        generation="ASSISTANT:",
        image=ImageTemplate(
            image_token=UNKNOWN,
            tokens_per_tile=spec.image_tokens_per_tile,
            tile="",
            row_end="",
            thumbnail="",
            single="{image}\n",
        ),
        stop_token_ids=read_stop_ids(checkpoint, spec),
        default_system=SYSTEM,
    )


def components(
    spec: ModelSpec, preprocess: Preprocess, context_length: int
) -> tuple[Component, ...]:
    """Vision encoder with projector, token embedding, decoder."""
    vision, text = spec.vision, spec.text
    arguments = (vision.hidden_size, text.hidden_size, vision.grid)
    projector: Callable[[], nn.Module] = partial(LdpV2Projector, *arguments)
    projector_rules: dict[str, Rule] = ldpv2_rules("model.mm_projector.")
    if spec.projector.kind == "ldp":
        projector = partial(LdpProjector, *arguments)
        projector_rules = ldp_rules("model.mm_projector.", text.hidden_size)
    tower = clip_rules(
        TOWER, vision, rescale=preprocess.rescale, mean=preprocess.mean, std=preprocess.std
    )
    head = "model.embed_tokens" if text.tied_embeddings else "lm_head"
    return (
        vision_component(spec, partial(ClipTower, vision), projector, tower | projector_rules),
        embedding_component(spec, context_length, "model.embed_tokens"),
        decoder_component(spec, context_length, llama_rules("model.", head, text, context_length)),
    )
