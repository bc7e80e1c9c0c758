"""The parts that families share, read from their sections of a config and their small files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lorgnette.errors import CheckpointError, ConfigError
from lorgnette.export.checkpoint import Checkpoint
from lorgnette.export.config import ConfigReader, read_rope_theta
from lorgnette.spec import ModelSpec, TextSpec, VisionSpec

Filter = Literal["lanczos", "bilinear", "bicubic"]
RESAMPLE: dict[int, Filter] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""By the number of PIL.Image.Resampling."""


@dataclass(frozen=True)
class VisionDefaults:
    """What a transformers config class of a vision tower takes for a missing key."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    image_size: int
    patch_size: int
    norm_eps: float


@dataclass(frozen=True)
class TextDefaults:
    """What a transformers config class of a decoder takes for a missing key."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    vocab_size: int
    max_positions: int
    kv_heads: int | None = None
    """None: as many as `heads`."""
    norm_eps: float = 1e-6


SIGLIP = VisionDefaults(768, 3072, 12, 12, 224, 16, 1e-6)
CLIP = VisionDefaults(768, 3072, 12, 12, 224, 32, 1e-5)
LLAMA = TextDefaults(4096, 11008, 32, 32, 32000, 2048)
QWEN2 = TextDefaults(4096, 22016, 32, 32, 151936, 32768, kv_heads=32)


def read_vision(vision: ConfigReader, defaults: VisionDefaults, activation: str) -> VisionSpec:
    """The numbers of a vision transformer that uses one activation function."""
    vision.fixed("hidden_act", activation)
    vision.fixed("num_channels", 3)
    return VisionSpec(
        hidden_size=vision.integer("hidden_size", defaults.hidden_size),
        intermediate_size=vision.integer("intermediate_size", defaults.intermediate_size),
        layers=vision.integer("num_hidden_layers", defaults.layers, most=1024),
        heads=vision.integer("num_attention_heads", defaults.heads, most=1024),
        image_size=vision.integer("image_size", defaults.image_size, most=8192),
        patch_size=vision.integer("patch_size", defaults.patch_size, most=1024),
        norm_eps=vision.number("layer_norm_eps", defaults.norm_eps),
    )


def read_decoder(
    text: ConfigReader, defaults: TextDefaults, *, tied: bool, qkv_bias: bool
) -> TextSpec:
    """The numbers of a decoder of the LLaMA kind, Qwen2's included.

    Args:
        text: The config's object that holds them.
        defaults: For missing keys.
        tied: Whether the head is the embedding.
        qkv_bias: Whether queries, keys and values have biases.
    """
    text.fixed("hidden_act", "silu")
    width = text.integer("hidden_size", defaults.hidden_size)
    heads = text.integer("num_attention_heads", defaults.heads, most=1024)
    return TextSpec(
        hidden_size=width,
        intermediate_size=text.integer("intermediate_size", defaults.intermediate_size),
        layers=text.integer("num_hidden_layers", defaults.layers, most=1024),
        heads=heads,
        kv_heads=text.integer("num_key_value_heads", defaults.kv_heads or heads, most=1024),
        head_size=text.integer("head_dim", max(width // heads, 1), most=4096),
        vocab_size=text.integer("vocab_size", defaults.vocab_size),
        max_positions=text.integer("max_position_embeddings", defaults.max_positions),
        rope_theta=read_rope_theta(text),
        norm_eps=text.number("rms_norm_eps", defaults.norm_eps),
        tied_embeddings=tied,
        qkv_bias=qkv_bias,
    )


def check_sizes(spec: ModelSpec, where: str) -> None:
    """Refuses numbers that no model of these layers can have.

    Raises:
        ConfigError: Naming what does not fit.
    """
    vision, text = spec.vision, spec.text
    for fits, what, got in (
        (vision.patch_size <= vision.image_size, "patch_size over image_size", vision.patch_size),
        (
            vision.hidden_size % vision.heads == 0,
            "vision width not divisible by heads",
            vision.heads,
        ),
        (text.hidden_size % text.heads == 0, "decoder width not divisible by heads", text.heads),
        (text.heads % text.kv_heads == 0, "heads not divisible by key/value heads", text.kv_heads),
        (text.head_size % 8 == 0, "head size not a multiple of 8", text.head_size),
        (
            spec.image_token_id < text.vocab_size,
            "image_token_id outside the vocabulary",
            spec.image_token_id,
        ),
    ):
        if not fits:
            raise ConfigError(f"sizes do not fit: {what}", where=where, got=got)


def read_stop_ids(checkpoint: Checkpoint, spec: ModelSpec) -> tuple[int, ...]:
    """The tokens that end an answer, from generation_config.json or else config.json.

    Raises:
        ConfigError: There are none, or one is outside the vocabulary.
    """
    sources: tuple[tuple[str, Mapping[str, Any]], ...] = (
        ("generation_config.json", checkpoint.json("generation_config.json") or {}),
        ("config.json", checkpoint.config),
        ("config.json text_config", checkpoint.config.get("text_config", {})),
    )
    for name, values in sources:
        value = values.get("eos_token_id")
        ids = value if isinstance(value, list) else [value] if value is not None else []
        if ids and all(type(i) is int and 0 <= i < spec.text.vocab_size for i in ids):
            return tuple(sorted(set(ids)))
        if ids:
            raise ConfigError(
                "eos_token_id is outside the vocabulary", where=checkpoint.place(name), got=value
            )
    raise ConfigError(
        "no eos_token_id, so no answer would end", where=checkpoint.place("generation_config.json")
    )


def read_chat_template(checkpoint: Checkpoint) -> tuple[str, str]:
    """The template and the file that it was found in, looked for where it may be published.

    Raises:
        CheckpointError: There is none.
    """
    text = checkpoint.text("chat_template.jinja")
    if text is not None:
        return text, str(checkpoint.path / "chat_template.jinja")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        value = (checkpoint.json(name) or {}).get("chat_template")
        if isinstance(value, str):
            return value, str(checkpoint.path / name)
    raise CheckpointError(
        "no chat template",
        where=checkpoint.path,
        wanted="chat_template.jinja, chat_template.json or tokenizer_config.json with one",
    )


def read_pixel_range(
    config: ConfigReader, mean: list[float], std: list[float]
) -> tuple[float, tuple[float, float, float], tuple[float, float, float]]:
    """Rescale factor, mean and standard deviation of an image processor's config."""
    for key in ("do_convert_rgb", "do_normalize", "do_rescale", "do_resize"):
        config.fixed(key, True)
    rescale = config.number("rescale_factor", 1 / 255)
    return rescale, _triple(config, "image_mean", mean), _triple(config, "image_std", std)


def read_resample(config: ConfigReader, default: int) -> Filter:
    """The resampling filter by name.

    Raises:
        ConfigError: It is not one of `RESAMPLE`.
    """
    resample = config.integer("resample", default, most=5)
    if resample not in RESAMPLE:
        raise ConfigError(
            "resampling filter is not supported",
            where=config.where,
            got=resample,
            wanted="1, 2 or 3",
        )
    return RESAMPLE[resample]


def _triple(config: ConfigReader, key: str, default: list[float]) -> tuple[float, float, float]:
    value = config.values.get(key, default)
    config.ignore({key: "read here"})
    if not (isinstance(value, list) and len(value) == 3):
        raise ConfigError(f"'{key}' is not a list of three", where=config.where, got=value)
    if not all(isinstance(part, int | float) and 0 < part <= 1 for part in value):
        raise ConfigError(f"'{key}' is outside 0..1", where=config.where, got=value)
    return float(value[0]), float(value[1]), float(value[2])
