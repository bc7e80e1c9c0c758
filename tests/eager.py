"""Our own modules loaded from a checkpoint and run eagerly: the middle between two oracles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.export import ExportedProgram

from lorgnette.export.checkpoint import Checkpoint
from lorgnette.export.component import Component, Family
from lorgnette.export.families import find_family, open_checkpoint
from lorgnette.export.trace import build_module, trace
from lorgnette.export.weights import WeightSource, check_all_used, load_module, module_shapes
from lorgnette.quantize.methods import load_method
from lorgnette.quantize.plan import PLANS, QuantPlan
from lorgnette.recipe import Recipe
from lorgnette.spec import ModelSpec

CONTEXT = 128
"""KV cache capacity of the tiny models."""


class StoredSource(WeightSource):
    """Weights as an engine sees them: rounded to their scheme and back to float32."""

    component: str
    plan: QuantPlan

    def tensor(self, name: str) -> Tensor:
        """The parameter after rounding."""
        value = super().tensor(name)
        # Matrices are what linear layers and embeddings call their weight.
        if value.dim() != 2 or not name.endswith(".weight"):
            return value
        rule = self.plan.rule_for(self.component, name)
        scheme = rule.scheme
        if scheme.is_integer:
            made = load_method(rule.method).quantize(value.numpy(), scheme)
            return torch.from_numpy(made.dequantize())
        return value.half().float() if scheme.bits == 16 else value


@dataclass
class Eager:
    """The three components of a checkpoint, run in plain torch.

    Attributes:
        folder: The checkpoint, a directory or a GGUF file.
        plan: How its matrices are rounded.
        context: KV cache capacity S.
        vision: The vision tower where it lies apart.
    """

    folder: Path
    plan: QuantPlan = PLANS["fp32"]
    context: int = CONTEXT
    vision: Path | None = None

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The opened folder."""
        return open_checkpoint(self.folder, self.vision)

    @cached_property
    def family(self) -> Family:
        """What reads it."""
        return find_family(self.checkpoint.config["model_type"])[1]

    @cached_property
    def spec(self) -> ModelSpec:
        """Its numbers."""
        return self.family.parse(self.checkpoint)

    @cached_property
    def components(self) -> dict[str, Component]:
        """By name."""
        preprocess = self.family.preprocess(self.checkpoint, self.spec, Recipe())
        found = self.family.components(self.spec, preprocess, self.context)
        return {component.name: component for component in found}

    @cached_property
    def sources(self) -> dict[str, StoredSource]:
        """The weights of each component; all of the checkpoint is used."""
        made = {}
        for name, component in self.components.items():
            shapes = module_shapes(build_module(component))
            made[name] = StoredSource(self.checkpoint, shapes, component.rules)
            made[name].component, made[name].plan = name, self.plan
        check_all_used(self.checkpoint, made.values(), self.family.IGNORED_TENSORS)
        return made

    @cached_property
    def programs(self) -> dict[str, ExportedProgram]:
        """The traced components; tracing is the slow part of a test, and no plan matters to it."""
        return {name: trace(component) for name, component in self.components.items()}

    @cached_property
    def modules(self) -> dict[str, torch.nn.Module]:
        """The loaded modules."""
        return {
            name: load_module(build_module(component), self.sources[name])
            for name, component in self.components.items()
        }

    @torch.no_grad()
    def encode(self, tiles: NDArray[np.uint8]) -> Tensor:
        """Tiles `[G, 3, edge, edge]` to image tokens `[G, N, D]`."""
        return self.modules["vision_encoder"](torch.from_numpy(tiles))  # type: ignore[no-any-return]

    @torch.no_grad()
    def embed(self, ids: Sequence[int]) -> Tensor:
        """Token ids to `[1, T, D]`."""
        return self.modules["token_embedding"](torch.tensor([ids]))  # type: ignore[no-any-return]

    def splice(self, ids: Sequence[int], tiles: NDArray[np.uint8]) -> Tensor:
        """Embeddings with image tokens in the places of the image token."""
        embeddings = self.embed(ids)
        places = torch.tensor(ids) == self.spec.image_token_id
        embeddings[0, places] = self.encode(tiles).flatten(0, 1)
        return embeddings

    def empty_cache(self) -> list[Tensor]:
        """Zeros in the shape of the KV cache."""
        text = self.spec.text
        shape = (1, text.kv_heads, self.context, text.head_size)
        return [torch.zeros(shape) for _ in range(2 * text.layers)]

    @torch.no_grad()
    def decode(
        self, embeddings: Tensor, past: int, cache: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs T positions after `past`; returns the last one's logits `[V]` and the cache."""
        length = torch.tensor([past], dtype=torch.int32)
        logits, cache = self.modules["decoder"](embeddings, length, cache)
        return logits[0], cache

    def logits(self, embeddings: Tensor, chunks: Sequence[int]) -> Tensor:
        """Logits after each of several calls of `chunks` positions, `[len(chunks), V]`."""
        cache, past, found = self.empty_cache(), 0, []
        for size in chunks:
            logits, cache = self.decode(embeddings[:, past : past + size], past, cache)
            past += size
            found.append(logits)
        return torch.stack(found)

    def greedy(self, embeddings: Tensor, steps: int) -> list[int]:
        """The most likely ids, one after the other."""
        logits, cache = self.decode(embeddings, 0, self.empty_cache())
        past, ids = embeddings.shape[1], [int(logits.argmax())]
        while len(ids) < steps:
            logits, cache = self.decode(self.embed(ids[-1:]), past, cache)
            past += 1
            ids.append(int(logits.argmax()))
        return ids


def random_tiles(count: int, edge: int, seed: int = 0) -> NDArray[np.uint8]:
    """Noise with a slope, so that no two patches are alike. Shapes: `[count, 3, edge, edge]`."""
    draw = np.random.default_rng(seed)
    slope = np.linspace(0, 120, edge)[:, None] + np.linspace(0, 60, edge)
    noise = draw.integers(0, 76, (count, 3, edge, edge))
    return (slope + noise).astype(np.uint8)


def prompt_ids(eager: Eager, tiles: int, seed: int = 0) -> list[int]:
    """A prompt with text around the image tokens of some tiles."""
    draw = np.random.default_rng(seed)
    spec = eager.spec
    words = [int(i) for i in draw.integers(3, 440, 12 + tiles)]
    ids = [1, *words[:5]]
    for tile in range(tiles):
        ids += [words[5 + tile]] + [spec.image_token_id] * spec.image_tokens_per_tile
    return ids + words[5 + tiles :]
