"""config.json as this package reads it against transformers' config classes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from lorgnette.errors import EXIT_WRONG_INPUT, ConfigError
from lorgnette.export.checkpoint import Checkpoint
from lorgnette.export.config import ConfigReader
from lorgnette.export.families import family_names, find_family, smolvlm
from lorgnette.spec import ModelSpec, ProjectorSpec, TextSpec, VisionSpec
from tests.helpers import CONFIGS, Config, published_shapes, tiny_config

PUBLISHED = {path.stem: json.loads(path.read_text()) for path in sorted(CONFIGS.glob("*.json"))}
TENSORS = {"256M": (471, 256_484_928), "500M": (489, 507_482_304)}


def parse(config: Config) -> ModelSpec:
    return smolvlm.parse(Checkpoint(Path("folder"), config, {}))


def by_transformers(config: Config) -> ModelSpec:
    """The same numbers as transformers' config class for the model type understands them."""
    classes = {"smolvlm": transformers.SmolVLMConfig, "idefics3": transformers.Idefics3Config}
    read = classes[config["model_type"]](**copy.deepcopy(config))
    vision, text = read.vision_config, read.text_config
    return ModelSpec(
        family="smolvlm",
        model_type=read.model_type,
        variant={(576, 30): "256M", (960, 32): "500M", (2048, 24): "2.2B"}.get(
            (text.hidden_size, text.num_hidden_layers), "custom"
        ),
        vision=VisionSpec(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            layers=vision.num_hidden_layers,
            heads=vision.num_attention_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            norm_eps=vision.layer_norm_eps,
        ),
        text=TextSpec(
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_size=text.head_dim,
            vocab_size=text.vocab_size,
            max_positions=text.max_position_embeddings,
            rope_theta=float(text.rope_parameters["rope_theta"]),
            norm_eps=text.rms_norm_eps,
            tied_embeddings=read.tie_word_embeddings,
            qkv_bias=False,
        ),
        projector=ProjectorSpec(kind="pixel_shuffle", patches_per_token=read.scale_factor**2),
        image_token_id=read.image_token_id,
    )


def full_config() -> Config:
    """A config with every key that has a default, none of them at its default."""
    return tiny_config(
        image_token_id=7,
        scale_factor=1,
        use_cache=False,
        tie_word_embeddings=True,
        text={"vocab_size": 31_000, "rms_norm_eps": 1e-4, "rope_theta": 777.0},
        vision={"layer_norm_eps": 1e-3, "hidden_act": "gelu_pytorch_tanh", "num_channels": 3},
    )


def places(config: Config) -> Iterator[tuple[str, str]]:
    """Every (section, key); the section is empty for the top level."""
    for key, value in config.items():
        yield ("", key)
        if isinstance(value, dict):
            yield from ((key, inner) for inner in value)


def with_key(config: Config, section: str, key: str, value: object) -> Config:
    changed = copy.deepcopy(config)
    (changed[section] if section else changed)[key] = value
    return changed


def without(config: Config, section: str, key: str) -> Config:
    changed = copy.deepcopy(config)
    del (changed[section] if section else changed)[key]
    return changed


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name: str) -> None:
    got = parse(PUBLISHED[name])
    assert got == by_transformers(PUBLISHED[name])
    assert got.variant == next(v for v in ("256M", "500M", "2.2B") if v in f"{name} 2.2B")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_saved_again_by_transformers(name: str) -> None:
    config = PUBLISHED[name]
    classes = {"smolvlm": transformers.SmolVLMConfig, "idefics3": transformers.Idefics3Config}
    read = classes[config["model_type"]](**copy.deepcopy(config))
    for text in (read.to_json_string(use_diff=True), read.to_json_string(use_diff=False)):
        assert parse(json.loads(text)) == parse(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    """The helper that writes published shapes agrees with the published parameter counts."""
    shapes = published_shapes(PUBLISHED[name])
    elements = 0
    for shape in shapes.values():
        count = 1
        for size in shape:
            count *= size
        elements += count
    wanted = next((v for k, v in TENSORS.items() if k in name), None) or (
        657,
        2_246_784_880 if "SmolVLM2" in name else 2_246_272_880,
    )
    assert (len(shapes), elements) == wanted


@pytest.mark.parametrize(("section", "key"), list(places(full_config())))
def test_missing_key_means_the_class_default(section: str, key: str) -> None:
    config = without(full_config(), section, key)
    # Without these a model is not of this family, or its image token outside the vocabulary.
    if (section, key) in {("", "model_type"), ("", "image_token_id")}:
        with pytest.raises(ConfigError, match=key):
            parse(config)
        return
    assert parse(config) == by_transformers(config)


@pytest.mark.parametrize("name", PUBLISHED)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_several_missing_keys(name: str, data: st.DataObject) -> None:
    config = PUBLISHED[name]
    kept = {"model_type", "text_config", "vision_config", "image_token_id", "vocab_size"}
    optional = [place for place in places(config) if place[1] not in kept]
    chosen = data.draw(st.lists(st.sampled_from(optional), unique=True, max_size=6))
    for section, key in chosen:
        config = without(config, section, key)
    try:
        got = parse(config)
    except ConfigError as error:
        if "sizes do not fit" in error.what:
            return  # transformers sees that later or never
        raise
    assert got == by_transformers(config)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5000.0},
        {"rope_theta": 5000},
        {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}},
        {"rope_theta": 5000.0, "rope_parameters": {"rope_type": "default"}},
        {"rope_theta": 5000.0, "rope_parameters": None},
        {"rope_theta": 1.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    ],
)
def test_spellings_of_rope(rope: dict[str, Any]) -> None:
    config = full_config()
    del config["text_config"]["rope_theta"]
    config["text_config"] |= rope
    assert parse(config).text.rope_theta == 5000.0
    assert by_transformers(config).text.rope_theta == 5000.0


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("section", ["", "text_config", "vision_config"])
def test_spellings_of_dtype(section: str, key: str) -> None:
    assert parse(with_key(full_config(), section, key, "bfloat16")) == parse(full_config())


def test_square_sizes_as_pairs() -> None:
    config = full_config()
    for key, value in (("image_size", [32, 32]), ("patch_size", [8, 8])):
        config = with_key(config, "vision_config", key, value)
    assert parse(config) == parse(full_config())
    with pytest.raises(ConfigError, match="image_size"):
        parse(with_key(config, "vision_config", "image_size", [32, 40]))


def test_only_the_top_level_ties() -> None:
    config = with_key(full_config(), "", "tie_word_embeddings", False)
    config = with_key(config, "text_config", "tie_word_embeddings", True)
    assert (
        parse(config).text.tied_embeddings is by_transformers(config).text.tied_embeddings is False
    )


REFUSED: list[tuple[str, str, object]] = [
    ("", "new_trick", 3),
    ("text_config", "sliding_window", 512),
    ("vision_config", "qkv_scale", 0.5),
    ("", "use_resampler", True),
    ("", "qk_layer_norms", True),
    ("text_config", "qk_layer_norms", True),
    ("text_config", "rope_interleaved", True),
    ("text_config", "rope_scaling", {"type": "linear", "factor": 2.0}),
    ("text_config", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
    ("text_config", "rope_parameters", {"rope_theta": 1e4, "low_freq_factor": 1.0}),
    ("text_config", "rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    ("text_config", "rope_parameters", 5),
    ("text_config", "hidden_act", "gelu"),
    ("vision_config", "hidden_act", "gelu"),
    ("text_config", "attention_bias", True),
    ("text_config", "mlp_bias", True),
    ("text_config", "model_type", "qwen2"),
    ("vision_config", "model_type", "clip_vision_model"),
    ("vision_config", "num_channels", 1),
    ("text_config", "hidden_size", "64"),
    ("text_config", "hidden_size", 64.0),
    ("text_config", "hidden_size", True),
    ("text_config", "hidden_size", -64),
    ("text_config", "hidden_size", 0),
    ("text_config", "hidden_size", 10**30),
    ("text_config", "num_hidden_layers", [3]),
    ("text_config", "rope_theta", "10000"),
    ("text_config", "rope_theta", float("nan")),
    ("text_config", "rope_theta", float("inf")),
    ("text_config", "rope_theta", 10**400),
    ("text_config", "rms_norm_eps", 0.0),
    ("vision_config", "layer_norm_eps", -1e-6),
    ("", "tie_word_embeddings", 1),
    ("", "image_token_id", -1),
    ("", "image_token_id", 3.5),
    ("", "scale_factor", 0),
    ("", "text_config", []),
    ("", "vision_config", "siglip"),
]


@pytest.mark.parametrize(("section", "key", "value"), REFUSED)
def test_refused(section: str, key: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(with_key(full_config(), section, key, value))
    assert caught.value.exit_code == EXIT_WRONG_INPUT
    told = str(caught.value)
    inner = next(iter(value.keys() - {"rope_theta"})) if isinstance(value, dict) else key
    assert key in told or str(inner) in told
    assert "config.json" in told
    assert section in told
    assert len(told) < 400


@pytest.mark.parametrize(
    ("section", "key", "value", "told"),
    [
        ("", "scale_factor", 3, "patch grid not divisible"),
        ("", "image_token_id", 31_000, "image_token_id outside"),
        ("text_config", "num_key_value_heads", 3, "key/value heads"),
        ("text_config", "head_dim", 12, "multiple of 8"),
        ("text_config", "hidden_size", 66, "decoder width"),
        ("vision_config", "num_attention_heads", 5, "vision width"),
        ("vision_config", "patch_size", 64, "patch_size over image_size"),
    ],
)
def test_sizes_that_do_not_fit(section: str, key: str, value: int, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse(with_key(full_config(), section, key, value))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(place=st.sampled_from(list(places(full_config()))), value=json_values)
def test_any_value_is_read_or_refused(place: tuple[str, str], value: object) -> None:
    """Nothing but a ConfigError comes out, whatever stands at a key."""
    try:
        spec = parse(with_key(full_config(), *place, value))
    except ConfigError:
        return
    assert spec.image_tokens_per_tile > 0


def test_null_means_missing() -> None:
    reader = ConfigReader({"a": None, "b": None, "c": None, "d": None}, "x")
    assert reader.integer("a", 5) == 5
    assert reader.number("b", 0.5) == 0.5
    assert reader.flag("c", True)
    reader.fixed("d", "only")
    reader.finish()
    with pytest.raises(ConfigError, match="'e' is missing in x"):
        reader.integer("e")


@pytest.mark.parametrize("model_type", ["llava", "SmolVLM", "", None, 7, ["smolvlm"]])
def test_unknown_model_type_lists_the_known(model_type: object) -> None:
    with pytest.raises(ConfigError) as caught:
        find_family(model_type)
    assert caught.value.exit_code == EXIT_WRONG_INPUT
    assert repr(model_type) in str(caught.value)
    for known in ("idefics3", "smolvlm"):
        assert known in str(caught.value)


def test_families_are_found_by_model_type() -> None:
    assert "smolvlm" in family_names()
    for model_type in ("idefics3", "smolvlm"):
        assert find_family(model_type)[0] == "smolvlm"
