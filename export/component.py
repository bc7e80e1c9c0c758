"""What a family hands on: components with named entry points, and the family protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from lorgnette.export.checkpoint import Checkpoint
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


class Family(Protocol):
    """What every module in `families/` defines."""

    MODEL_TYPES: tuple[str, ...]
    """The `model_type` values of config.json that it reads."""
    IGNORED_TENSORS: Mapping[str, str]
    """Patterns of published tensors that may stay unread, with the reason."""

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


class VisionEncoder(nn.Module):
    """A vision tower with its projector: uint8 tiles to image tokens."""

    def __init__(self, tower: nn.Module, projector: nn.Module) -> None:
        """Joins the two."""
        super().__init__()
        self.tower = tower
        self.projector = projector

    def forward(self, tiles: Tensor) -> Tensor:
        """Encodes uint8 `[G, 3, edge, edge]` to `[G, N, D]`."""
        return self.projector(self.tower(tiles))  # type: ignore[no-any-return]


class TokenEmbedding(nn.Module):
    """Token ids to decoder width. Shapes: int64 `[1, T]` to float32 `[1, T, D]`."""

    def __init__(self, vocab_size: int, width: int) -> None:
        """Creates the table."""
        super().__init__()
        self.table = nn.Embedding(vocab_size, width)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Looks the tokens up."""
        return self.table(token_ids)  # type: ignore[no-any-return]
