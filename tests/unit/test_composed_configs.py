"""Configs of MobileVLM and OmniVLM: published numbers, transformers' defaults, every refusal."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen2Config

from lorgnette.errors import CheckpointError, ConfigError, LorgnetteError
from lorgnette.export.checkpoint import Checkpoint
from lorgnette.export.families import find_family, mobilevlm, omnivlm
from lorgnette.recipe import Recipe
from lorgnette.spec import ModelSpec, PromptSpec, SquarePreprocess
from tests import make_mobilevlm, make_omnivlm
from tests.helpers import Config

MOBILE = {p.stem: json.loads(p.read_text()) for p in make_mobilevlm.CONFIGS.glob("*.json")}
OMNI = {p.stem: json.loads(p.read_text()) for p in make_omnivlm.CONFIGS.glob("*.json")}
FAMILIES: dict[str, tuple[ModuleType, Config]] = {
    "mobilevlm": (mobilevlm, MOBILE["MobileVLM_V2-1.7B"]),
    "omnivlm": (omnivlm, OMNI["OmniVLM-968M"]),
}
PROJECTOR_PARAMETERS = {
    "MobileVLM-1.7B": 18_936_832,
    "MobileVLM_V2-1.7B": 6_316_032,
    "MobileVLM-3B": 28_913_920,
    "MobileVLM_V2-3B": 9_205_760,
    "MobileVLM_V2-7B": 21_020_672,
}
"""As counted on the original modules."""


def checkpoint(config: Mapping[str, Any], files: Mapping[str, object] | None = None) -> Checkpoint:
    contents = {name: json.dumps(value).encode() for name, value in (files or {}).items()}
    return Checkpoint(Path("folder"), config, {}, contents)


def parse(family: ModuleType, config: Config, files: dict[str, object] | None = None) -> ModelSpec:
    spec: ModelSpec = family.parse(checkpoint(config, files))
    return spec


def elements(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def changed(config: Config, place: str, value: object) -> Config:
    """The config with `section.key` or `key` set, or taken out where the value is `...`."""
    config = copy.deepcopy(config)
    section, _, key = place.rpartition(".")
    target = config[section] if section else config
    if value is ...:
        del target[key]
    else:
        target[key] = value
    return config


@pytest.mark.parametrize("name", MOBILE)
def test_published_mobilevlm(name: str) -> None:
    config = MOBILE[name]
    spec = parse(mobilevlm, config)
    text = LlamaConfig(**{k: v for k, v in config.items() if k != "model_type"})
    assert spec.text.hidden_size == text.hidden_size
    assert spec.text.head_size == {2048: 128, 2560: 80, 4096: 128}[text.hidden_size]
    assert (spec.text.layers, spec.text.kv_heads) == (text.num_hidden_layers, spec.text.heads)
    assert spec.text.max_positions == text.max_position_embeddings
    assert (spec.text.norm_eps, spec.text.rope_theta) == (text.rms_norm_eps, 10000.0)
    assert not spec.text.tied_embeddings
    assert (spec.vision.layers, spec.vision.grid, spec.vision.norm_eps) == (23, 24, 1e-5)
    assert spec.image_tokens_per_tile == 144
    version = "V2" if "V2" in name else "v1"
    assert spec.variant == f"{version} {name.rpartition('-')[2]}"
    shapes = make_mobilevlm.projector_shapes(config["mm_projector_type"], 1024, text.hidden_size)
    assert elements(shapes) == PROJECTOR_PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "tokens", "variant"),
    [("OmniVLM-968M", 81, "968M"), ("nano-vlm-instruct", 729, "nano-vlm-instruct")],
)
def test_published_omnivlm(name: str, tokens: int, variant: str) -> None:
    spec = parse(omnivlm, OMNI[name])
    text = Qwen2Config(**OMNI[name]["text_config"])
    assert spec.text.hidden_size == text.hidden_size == 896
    assert (spec.text.heads, spec.text.kv_heads, spec.text.head_size) == (14, 2, 64)
    assert (spec.text.rope_theta, spec.text.norm_eps) == (1e6, 1e-6)
    assert spec.text.tied_embeddings
    assert spec.text.qkv_bias
    assert (spec.vision.layers, spec.vision.grid, spec.vision.norm_eps) == (27, 27, 1e-6)
    assert (spec.image_tokens_per_tile, spec.variant) == (tokens, variant)
    if name == "OmniVLM-968M":
        shapes = make_omnivlm.published_shapes(OMNI[name])
        of = {p: elements({n: s for n, s in shapes.items() if n.startswith(p)}) for p in PARTS}
        assert of == PARTS


PARTS = {"language_model.": 494_032_768, "multi_modal_projector.": 46_142_336}
"""Parameters that the published sizes add up from."""


@pytest.mark.parametrize("model_type", ["mobilevlm", "omnivlm"])
def test_found_by_model_type(model_type: str) -> None:
    assert find_family(model_type) == (model_type, FAMILIES[model_type][0])


WRONG: list[tuple[str, str, object, str]] = [
    ("mobilevlm", "mm_projector_type", "linear", "mm_projector_type"),
    ("mobilevlm", "mm_projector_type", ..., "mm_projector_type"),
    ("mobilevlm", "image_aspect_ratio", "anyres", "image_aspect_ratio"),
    ("mobilevlm", "image_aspect_ratio", ..., "image_aspect_ratio"),
    ("mobilevlm", "mm_vision_select_layer", -1, "mm_vision_select_layer"),
    ("mobilevlm", "mm_vision_select_feature", "cls_patch", "mm_vision_select_feature"),
    ("mobilevlm", "mm_use_im_start_end", True, "mm_use_im_start_end"),
    ("mobilevlm", "mm_hidden_size", 768, "mm_hidden_size"),
    ("mobilevlm", "mm_vision_tower", "openai/clip-vit-base-patch16", "vision tower is not known"),
    ("mobilevlm", "mm_vision_tower", "../clip", "vision tower is not known"),
    ("mobilevlm", "mm_vision_tower", "/etc", "vision tower is not known"),
    ("mobilevlm", "mm_vision_tower", 3, "vision tower is not known"),
    ("mobilevlm", "mm_vision_tower", ["x"], "vision tower is not known"),
    ("mobilevlm", "mm_vision_tower", ..., "vision tower is not known"),
    ("mobilevlm", "hidden_act", "gelu", "hidden_act"),
    ("mobilevlm", "num_attention_heads", 7, "divisible"),
    ("mobilevlm", "num_key_value_heads", 3, "divisible"),
    ("mobilevlm", "rope_scaling", {"type": "linear", "factor": 2}, "rope_scaling"),
    ("mobilevlm", "mm_something_new", 1, "mm_something_new"),
    ("omnivlm", "projector_group", 10, "projector_group"),
    ("omnivlm", "projector_group", 0, "projector_group"),
    ("omnivlm", "image_token_id", 10**6, "image_token_id"),
    ("omnivlm", "something_new", 1, "something_new"),
    ("omnivlm", "vision_config.hidden_act", "gelu", "hidden_act"),
    ("omnivlm", "vision_config.model_type", "clip_vision_model", "model_type"),
    ("omnivlm", "vision_config.num_attention_heads", 7, "divisible"),
    ("omnivlm", "text_config.model_type", "llama", "model_type"),
    ("omnivlm", "text_config.use_sliding_window", True, "use_sliding_window"),
    ("omnivlm", "text_config.hidden_size", "896", "hidden_size"),
    ("omnivlm", "text_config", 3, "text_config"),
]


@pytest.mark.parametrize(("name", "place", "value", "told"), WRONG)
def test_what_is_not_understood_is_refused(name: str, place: str, value: object, told: str) -> None:
    family, config = FAMILIES[name]
    with pytest.raises(ConfigError, match=told) as caught:
        parse(family, changed(config, place, value))
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"), [("model_type", "siglip_vision_model"), ("hidden_act", "gelu"), ("new", 1)]
)
def test_a_tower_of_another_kind_is_refused(key: str, value: object) -> None:
    config = make_mobilevlm.tiny_config()
    tower = make_mobilevlm.TINY_CLIP | {key: value}
    with pytest.raises(ConfigError, match=key):
        parse(mobilevlm, config, {"vision_tower/config.json": tower})


@pytest.mark.parametrize(("change", "told"), [({"image_size": 54}, "odd"), ({}, None)])
def test_an_odd_grid_is_refused(change: Config, told: str | None) -> None:
    files: dict[str, object] = {"vision_tower/config.json": make_mobilevlm.TINY_CLIP | change}
    if told is None:
        assert parse(mobilevlm, make_mobilevlm.tiny_config(), files).image_tokens_per_tile == 16
        return
    with pytest.raises(ConfigError, match=told):
        parse(mobilevlm, make_mobilevlm.tiny_config(), files)


def preprocess(
    name: str, recipe: Recipe, files: dict[str, object] | None = None
) -> SquarePreprocess:
    family, config = FAMILIES[name]
    opened = checkpoint(config, files)
    found: SquarePreprocess = family.preprocess(opened, family.parse(opened), recipe)
    return found


def test_published_preprocessing() -> None:
    clip = preprocess("mobilevlm", Recipe())
    assert (clip.tile_size, clip.fit, clip.background) == (336, "pad", (122, 116, 104))
    assert (clip.resample, clip.rescale) == ("bicubic", 1 / 255)
    siglip = preprocess("omnivlm", Recipe())
    assert (siglip.tile_size, siglip.fit, siglip.resample) == (384, "stretch", "bicubic")
    assert siglip.mean == siglip.std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "recipe", [Recipe(max_tiles=4), Recipe(longest_edge=512), Recipe(split=True)]
)
def test_a_recipe_cannot_ask_for_tiles(name: str, recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match="no meaning for this family"):
        preprocess(name, recipe)
    assert preprocess(name, Recipe(max_tiles=1, split=False)) == preprocess(name, Recipe())


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"size": {"height": 224, "width": 384}}, "height"),
        ({"resample": 4}, "resampling"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"do_rescale": False}, "do_rescale"),
        ({"do_pan_and_scan": True}, "do_pan_and_scan"),
    ],
)
def test_another_preprocessing_is_refused(values: Config, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        preprocess("omnivlm", Recipe(), {"preprocessor_config.json": values})


def prompt(name: str, tokens: dict[str, int]) -> PromptSpec:
    family, config = FAMILIES[name]
    opened = checkpoint(config, {"generation_config.json": {"eos_token_id": 2}})
    found: PromptSpec = family.prompt(opened, family.parse(opened), tokens)
    return found


@pytest.mark.parametrize(
    ("name", "tokens", "told"),
    [
        ("mobilevlm", {"<s>": 1, "</s>": 2}, "<unk>"),
        ("mobilevlm", {"<unk>": 3, "<s>": 1, "</s>": 2}, "another id"),
        ("omnivlm", {"<|im_start|>": 4, "<|im_end|>": 5}, "image_pad"),
        ("omnivlm", {"<|image_pad|>": 151655, "<|im_start|>": 4}, "im_end"),
    ],
)
def test_a_tokenizer_without_the_prompt_s_tokens_is_refused(
    name: str, tokens: dict[str, int], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        prompt(name, tokens)


def test_answers_end_at_every_stop_token() -> None:
    tokens = {"<|image_pad|>": 151655, "<|im_start|>": 4, "<|im_end|>": 5, "<|endoftext|>": 6}
    assert prompt("omnivlm", tokens).stop_token_ids == (2, 5, 6)
    assert prompt("mobilevlm", {"<unk>": 0, "<s>": 1, "</s>": 2}).stop_token_ids == (2,)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tower_apart_where_it_has_no_use(name: str) -> None:
    family, config = FAMILIES[name]
    other = checkpoint({"model_type": "siglip_vision_model"})
    with pytest.raises(LorgnetteError, match=r"CLIP's|one directory"):
        family.normal_form(checkpoint(config), other)


def test_smolvlm_takes_no_tower_apart() -> None:
    _, family = find_family("smolvlm")
    with pytest.raises(CheckpointError, match="--vision"):
        family.normal_form(checkpoint({}), checkpoint({}))
