"""SmolVLM and SmolVLM2: SigLIP tower, pixel shuffle, LLaMA decoder.

Published as model types `idefics3` (v1) and `smolvlm` (v2), which compute the same thing.
Source: Marafioti et al. 2025, arXiv:2504.05299; transformers 5.23 `idefics3` and `smolvlm`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch

from lorgnette.errors import CheckpointError, ConfigError
from lorgnette.export.chat_template import compile_chat_template
from lorgnette.export.checkpoint import Checkpoint
from lorgnette.export.component import Component, TensorSpec, TokenEmbedding, VisionEncoder
from lorgnette.export.config import ConfigReader, read_rope_theta
from lorgnette.export.layers.decoder import LlamaDecoder
from lorgnette.export.layers.projectors import PixelShuffleProjector
from lorgnette.export.layers.rope import rope_tables
from lorgnette.export.layers.vision import SiglipTower
from lorgnette.export.picture_size import choose_tiling
from lorgnette.export.weights import Computed, Flatten, Rule, Stack
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

IGNORED_TENSORS: Mapping[str, str] = {
    r"model\.text_model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "computed anew",
    r"model\.vision_model\.embeddings\.position_ids": "always the identity here",
    r"lm_head\.weight": "the embedding again, where the config ties them; otherwise it is read",
}

VISION_TYPES = ("idefics3", "idefics3_vision", "smolvlm_vision", "siglip_vision_model")
MAX_TILES = 64  # tiles of one vision call; a picture has 17 at most at the published sizes
RESAMPLE = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling
VARIANTS = {(576, 30): "256M", (960, 32): "500M", (2048, 24): "2.2B"}  # by width and layers
HEAD, EMBEDDING = "lm_head.weight", "model.text_model.embed_tokens.weight"
FAKE, GLOBAL, IMAGE = "<fake_token_around_image>", "<global-img>", "<image>"


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
    _check_sizes(spec, config.where)
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
    vision.fixed("hidden_act", "gelu_pytorch_tanh")
    vision.fixed("num_channels", 3)
    vision.ignore(
        {
            "max_image_size": "the preprocessor config decides",
            "size": "the preprocessor config decides",
            "use_base_siglip": "the sizes say it",
            "tie_word_embeddings": "the tower has none",
        }
    )
    spec = VisionSpec(
        hidden_size=vision.integer("hidden_size", 1152),
        intermediate_size=vision.integer("intermediate_size", 3072),
        layers=vision.integer("num_hidden_layers", 12, most=1024),
        heads=vision.integer("num_attention_heads", 16, most=1024),
        image_size=vision.integer("image_size", 224, most=8192),
        patch_size=vision.integer("patch_size", 32, most=1024),
        norm_eps=vision.number("layer_norm_eps", 1e-6),
    )
    vision.finish()
    return spec


def _parse_text(text: ConfigReader, *, norm_eps: float, tied: bool) -> TextSpec:
    text.fixed("model_type", "llama")
    text.fixed("hidden_act", "silu")
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
    width = text.integer("hidden_size", 4096)
    heads = text.integer("num_attention_heads", 32, most=1024)
    spec = TextSpec(
        hidden_size=width,
        intermediate_size=text.integer("intermediate_size", 11008),
        layers=text.integer("num_hidden_layers", 32, most=1024),
        heads=heads,
        kv_heads=text.integer("num_key_value_heads", heads, most=1024),
        head_size=text.integer("head_dim", max(width // heads, 1), most=4096),
        vocab_size=text.integer("vocab_size", 32000),
        max_positions=text.integer("max_position_embeddings", 2048),
        rope_theta=read_rope_theta(text),
        norm_eps=text.number("rms_norm_eps", norm_eps),
        tied_embeddings=tied,
        qkv_bias=False,
    )
    text.finish()
    return spec


def _scale(spec: ModelSpec) -> int:
    """Patches along a side of the block that becomes one image token."""
    return math.isqrt(spec.projector.patches_per_token)


def _check_sizes(spec: ModelSpec, where: str) -> None:
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
            vision.grid % _scale(spec) == 0,
            "patch grid not divisible by scale_factor",
            vision.grid,
        ),
        (
            spec.image_token_id < text.vocab_size,
            "image_token_id outside the vocabulary",
            spec.image_token_id,
        ),
    ):
        if not fits:
            raise ConfigError(f"sizes do not fit: {what}", where=where, got=got)


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
    for key in ("do_convert_rgb", "do_normalize", "do_rescale", "do_resize"):
        config.fixed(key, True)
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
    resample = config.integer("resample", 1, most=5)
    if resample not in RESAMPLE:
        raise ConfigError(
            "resampling filter is not supported",
            where=config.where,
            got=resample,
            wanted="1, 2 or 3",
        )
    result = TilePreprocess(
        tile_size=tile.integer("longest_edge", 364, most=8192),
        longest_edge=size.integer("longest_edge", 1456, most=4096),
        split=config.flag("do_image_splitting", True),
        resample=RESAMPLE[resample],  # type: ignore[arg-type]
        rescale=config.number("rescale_factor", 1 / 255),
        mean=_triple(config, "image_mean"),
        std=_triple(config, "image_std"),
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


def _triple(config: ConfigReader, key: str) -> tuple[float, float, float]:
    value = config.values.get(key, [0.5, 0.5, 0.5])
    config.ignore({key: "read here"})
    if not (isinstance(value, list) and len(value) == 3):
        raise ConfigError(f"'{key}' is not a list of three", where=config.where, got=value)
    if not all(isinstance(part, int | float) and 0 < part <= 1 for part in value):
        raise ConfigError(f"'{key}' is outside 0..1", where=config.where, got=value)
    return float(value[0]), float(value[1]), float(value[2])


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


def read_chat_template(checkpoint: Checkpoint) -> tuple[str, str]:
    """The template and the file that it was found in, looked for where it may be published."""
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


def read_stop_ids(checkpoint: Checkpoint, spec: ModelSpec) -> tuple[int, ...]:
    """The tokens that end an answer, from generation_config.json or else config.json."""
    sources = (
        ("generation_config.json", checkpoint.json("generation_config.json") or {}),
        ("config.json", checkpoint.config),
        ("config.json text_config", checkpoint.config.get("text_config", {})),
    )
    for name, values in sources:
        value = values.get("eos_token_id")
        ids = value if isinstance(value, list) else [value] if value is not None else []
        if ids and all(isinstance(i, int) and 0 <= i < spec.text.vocab_size for i in ids):
            return tuple(sorted(set(ids)))
        if ids:
            raise ConfigError(
                "eos_token_id is outside the vocabulary", where=checkpoint.path / name, got=value
            )
    raise ConfigError(
        "no eos_token_id, so no answer would end", where=checkpoint.path / "generation_config.json"
    )


def components(
    spec: ModelSpec, preprocess: Preprocess, context_length: int
) -> tuple[Component, ...]:
    """Vision encoder with projector, token embedding, decoder."""
    return (
        _vision_encoder(spec, preprocess),
        _token_embedding(spec, context_length),
        _decoder(spec, context_length),
    )


def _vision_encoder(spec: ModelSpec, preprocess: Preprocess) -> Component:
    vision = spec.vision
    edge, patch = vision.image_size, vision.patch_size
    per_colour = patch * patch
    model = "model.vision_model."
    layer = f"{model}encoder.layers.{{i}}."
    rules: dict[str, Rule] = {
        "tower.embed.projection.weight": Flatten(
            f"{model}embeddings.patch_embedding.weight", (vision.hidden_size, 3, patch, patch)
        ),
        "tower.embed.projection": f"{model}embeddings.patch_embedding",
        "tower.embed.position": f"{model}embeddings.position_embedding.weight",
        "tower.embed.rescale": Computed(lambda: torch.tensor([preprocess.rescale])),
        "tower.embed.mean": Computed(
            lambda: torch.tensor(preprocess.mean).repeat_interleave(per_colour)
        ),
        "tower.embed.std": Computed(
            lambda: torch.tensor(preprocess.std).repeat_interleave(per_colour)
        ),
        "tower.layers.{i}.norm1": f"{layer}layer_norm1",
        "tower.layers.{i}.attention.q_proj": f"{layer}self_attn.q_proj",
        "tower.layers.{i}.attention.k_proj": f"{layer}self_attn.k_proj",
        "tower.layers.{i}.attention.v_proj": f"{layer}self_attn.v_proj",
        "tower.layers.{i}.attention.out_proj": f"{layer}self_attn.out_proj",
        "tower.layers.{i}.norm2": f"{layer}layer_norm2",
        "tower.layers.{i}.mlp.fc1": f"{layer}mlp.fc1",
        "tower.layers.{i}.mlp.fc2": f"{layer}mlp.fc2",
        "tower.norm": f"{model}post_layernorm",
        "projector.projection": "model.connector.modality_projection.proj",
    }

    def build() -> VisionEncoder:
        projector = PixelShuffleProjector(
            vision.hidden_size, spec.text.hidden_size, vision.grid, _scale(spec)
        )
        return VisionEncoder(SiglipTower(vision), projector)

    return Component(
        name="vision_encoder",
        entry_points=("encode",),
        build=build,
        rules=rules,
        inputs=(TensorSpec("tiles", torch.uint8, ("G", 3, edge, edge)),),
        outputs=(
            TensorSpec(
                "image_tokens",
                torch.float32,
                ("G", spec.image_tokens_per_tile, spec.text.hidden_size),
            ),
        ),
        dynamic_axes={"G": (1, MAX_TILES)},
    )


def _token_embedding(spec: ModelSpec, context_length: int) -> Component:
    text = spec.text
    return Component(
        name="token_embedding",
        entry_points=("embed",),
        build=partial(TokenEmbedding, text.vocab_size, text.hidden_size),
        rules={"table": "model.text_model.embed_tokens"},
        inputs=(TensorSpec("token_ids", torch.int64, (1, "T")),),
        outputs=(TensorSpec("embeddings", torch.float32, (1, "T", text.hidden_size)),),
        dynamic_axes={"T": (1, context_length)},
    )


def _decoder(spec: ModelSpec, context_length: int) -> Component:
    text = spec.text
    layer = "model.text_model.layers.{i}."
    tables = partial(rope_tables, context_length, text.head_size, text.rope_theta)
    rules: dict[str, Rule] = {
        "cos": Computed(lambda: tables()[0]),
        "sin": Computed(lambda: tables()[1]),
        "layers.{i}.norm1": f"{layer}input_layernorm",
        "layers.{i}.attention.qkv_proj": Stack(
            (
                (f"{layer}self_attn.q_proj", text.heads * text.head_size),
                (f"{layer}self_attn.k_proj", text.kv_heads * text.head_size),
                (f"{layer}self_attn.v_proj", text.kv_heads * text.head_size),
            )
        ),
        "layers.{i}.attention.o_proj": f"{layer}self_attn.o_proj",
        "layers.{i}.norm2": f"{layer}post_attention_layernorm",
        "layers.{i}.mlp.gate_up_proj": Stack(
            (
                (f"{layer}mlp.gate_proj", text.intermediate_size),
                (f"{layer}mlp.up_proj", text.intermediate_size),
            )
        ),
        "layers.{i}.mlp.down_proj": f"{layer}mlp.down_proj",
        "norm": "model.text_model.norm",
        "head": "model.text_model.embed_tokens" if text.tied_embeddings else "lm_head",
    }
    cache_shape = (1, text.kv_heads, "S", text.head_size)
    caches = [f"{kind}_{i}" for i in range(text.layers) for kind in ("key", "value")]
    return Component(
        name="decoder",
        entry_points=("prefill", "decode"),
        build=partial(LlamaDecoder, text, context_length),
        rules=rules,
        inputs=(
            TensorSpec("embeddings", torch.float32, (1, "T", text.hidden_size)),
            TensorSpec("past_length", torch.int32, (1,)),
        ),
        outputs=(TensorSpec("logits", torch.float32, (1, text.vocab_size)),),
        cache_inputs=tuple(TensorSpec(f"{n}_in", torch.float32, cache_shape) for n in caches),
        cache_outputs=tuple(TensorSpec(f"{n}_out", torch.float32, cache_shape) for n in caches),
        dynamic_axes={"T": (1, context_length), "S": (2, context_length)},
    )
