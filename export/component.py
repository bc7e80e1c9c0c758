"""What a family hands on: components with named entry points, and the family protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from lorgnette.export.checkpoint import Checkpoint
from lorgnette.export.layers.decoder import LlamaDecoder
from lorgnette.export.layers.stages import Stage
from lorgnette.export.layers.vision import ClipTower, SiglipTower
from lorgnette.export.weights import Rule
from lorgnette.recipe import Recipe
from lorgnette.spec import ModelSpec, Preprocess, PromptSpec


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output: name, dtype and shape, where a str names a dynamic axis."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Component:
    """A part of the model that is lowered to one graph.

    The inputs of `module` are those of `inputs`, in order; a `list[Tensor]` argument stands for
    all inputs named in `cache_inputs`.
    """

    name: str
    entry_points: tuple[str, ...]
    build: Callable[[], nn.Module]
    """Makes the module; called under the meta device, so it costs no memory."""
    rules: Mapping[str, Rule]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    cache_inputs: tuple[TensorSpec, ...] = ()
    cache_outputs: tuple[TensorSpec, ...] = ()
    dynamic_axes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Range of every named axis."""


def with_cache_bits(component: Component, bits: int) -> Component:
    """The component as it is lowered under a plan: its KV cache of int8 where that is of 8 bits.

    What is traced keeps a float32 cache: rounding is the engine's.
    """
    if bits == 32:
        return component

    def narrow(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(replace(spec, dtype=torch.int8) for spec in specs)

    return replace(
        component,
        cache_inputs=narrow(component.cache_inputs),
        cache_outputs=narrow(component.cache_outputs),
    )


class Family(Protocol):
    """What every module in `families/` defines."""

    MODEL_TYPES: tuple[str, ...]
    """The `model_type` values of config.json that it reads."""
    GGUF_ARCHITECTURES: tuple[str, ...]
    """The `general.architecture` of GGUF vision towers (mmproj files) that it reads."""
    IGNORED_TENSORS: Mapping[str, str]
    """Patterns of published tensors that may stay unread, with the reason."""

    def normal_form(self, checkpoint: Checkpoint, vision: Checkpoint | None) -> Checkpoint:
        """The checkpoint in the one layout that the rest of the family reads.

        Args:
            checkpoint: As opened.
            vision: The vision tower where it was given apart; refused by families that have no
                use for it.
        """

    def parse(self, checkpoint: Checkpoint) -> ModelSpec:
        """Reads the numbers; refuses config keys that it does not know."""

    def preprocess(self, checkpoint: Checkpoint, spec: ModelSpec, recipe: Recipe) -> Preprocess:
        """Reads the preprocessor config and applies what the recipe says of picture sizes."""

    def prompt(
        self, checkpoint: Checkpoint, spec: ModelSpec, tokens: Mapping[str, int]
    ) -> PromptSpec:
        """Compiles the chat template; `tokens` are the tokenizer's added tokens and ids."""

    def components(
        self, spec: ModelSpec, preprocess: Preprocess, context_length: int
    ) -> tuple[Component, ...]:
        """The graphs to make."""


Tower = SiglipTower | ClipTower


class VisionEncoder(nn.Module):
    """A vision tower with its projector: uint8 tiles to image tokens."""

    tower: Tower
    projector: nn.Module

    def __init__(self, tower: Tower, projector: nn.Module) -> None:
        """Joins the two."""
        super().__init__()
        self.tower = tower
        self.projector = projector

    def forward(self, tiles: Tensor) -> Tensor:
        """Encodes uint8 `[G, 3, edge, edge]` to `[G, N, D]`."""
        return self.projector(self.tower(tiles))  # type: ignore[no-any-return]

    def stages(self) -> list[Stage]:
        """What runs, in order: the tower's stages, then the projector."""
        tower = [replace(stage, prefix=f"tower.{stage.prefix}") for stage in self.tower.stages()]
        return [*tower, Stage("projector.", self.projector)]


class TokenEmbedding(nn.Module):
    """Token ids to decoder width. Shapes: int64 `[1, T]` to float32 `[1, T, D]`."""

    def __init__(self, vocab_size: int, width: int) -> None:
        """Creates the table."""
        super().__init__()
        self.table = nn.Embedding(vocab_size, width)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Looks the tokens up."""
        return self.table(token_ids)  # type: ignore[no-any-return]


MAX_TILES = 64  # tiles of one vision call; no published picture has more than 17


def vision_component(
    spec: ModelSpec,
    tower: Callable[[], Tower],
    projector: Callable[[], nn.Module],
    rules: Mapping[str, Rule],
) -> Component:
    """The component `vision_encoder`.

    Args:
        spec: The numbers of the model.
        tower: Makes the tower.
        projector: Makes the projector.
        rules: Weights of both, as `tower.*` and `projector.*`.
    """
    edge = spec.vision.image_size
    image_tokens = ("G", spec.image_tokens_per_tile, spec.text.hidden_size)
    return Component(
        name="vision_encoder",
        entry_points=("encode",),
        build=lambda: VisionEncoder(tower(), projector()),
        rules=rules,
        inputs=(TensorSpec("tiles", torch.uint8, ("G", 3, edge, edge)),),
        outputs=(TensorSpec("image_tokens", torch.float32, image_tokens),),
        dynamic_axes={"G": (1, MAX_TILES)},
    )


def embedding_component(spec: ModelSpec, context_length: int, source: str) -> Component:
    """The component `token_embedding`; `source` is the published name of its table."""
    text = spec.text
    return Component(
        name="token_embedding",
        entry_points=("embed",),
        build=partial(TokenEmbedding, text.vocab_size, text.hidden_size),
        rules={"table": source},
        inputs=(TensorSpec("token_ids", torch.int64, (1, "T")),),
        outputs=(TensorSpec("embeddings", torch.float32, (1, "T", text.hidden_size)),),
        dynamic_axes={"T": (1, context_length)},
    )


def decoder_component(spec: ModelSpec, context_length: int, rules: Mapping[str, Rule]) -> Component:
    """The component `decoder`, for decoders of the LLaMA kind.

    Args:
        spec: The numbers of the model.
        context_length: The most positions.
        rules: Weights, and the rotary tables of that many positions.
    """
    text = spec.text
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
