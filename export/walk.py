"""A model as one row of steps, from pictures to logits, that can be entered anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorgnette.export.layers.stages import Stage
from lorgnette.export.reference import RESIDENT_BYTES, load_stage
from lorgnette.export.trace import build_module

if TYPE_CHECKING:
    from lorgnette.export.check import Parts
    from lorgnette.export.component import VisionEncoder
    from lorgnette.export.layers.decoder import LlamaDecoder

State = list[Tensor]
"""Tiles, one a tensor or several, in the vision encoder; one tensor of all positions behind it."""
Read = Callable[[str, str], Tensor]
"""Component and parameter to its numbers."""


@dataclass(frozen=True, eq=False)
class Passage:
    """What is sent through a model: a picture and a text that is given in full.

    Attributes:
        tiles: uint8 `[G, 3, edge, edge]`.
        ids: Prompt and answer, image tokens as placeholders.
        slots: int64, positions of image tokens.
        outputs: Logits are asked for at so many of the last positions.
    """

    tiles: NDArray[np.uint8]
    ids: tuple[int, ...]
    slots: NDArray[np.int64]
    outputs: int


@dataclass(frozen=True)
class Step:
    """One stage of one component.

    Attributes:
        component: The component.
        stage: What is loaded; its prefix is that of its parameters in the component.
        run: What it makes of a passage's state.
    """

    component: str
    stage: Stage
    run: Callable[[Passage, State], State]

    @property
    def matrices(self) -> Iterator[str]:
        """Every weight of two axes that it holds, by name in the component."""
        for name, value in self.stage.module.named_parameters():
            if value.ndim == 2:
                yield self.stage.prefix + name


class ModelWalk:
    """The steps of a model as it was published.

    Each step computes, operation for operation, what `Reference` does. A small model is loaded
    once; of a large one, the step that runs is in memory and no other.

    Attributes:
        steps: All of them, in order.
    """

    def __init__(self, parts: Parts) -> None:
        """Builds the steps; reads nothing but the rotary tables."""
        components = {component.name: component for component in parts.components}
        self._sources = parts.sources
        sizes = (
            math.prod(shape)
            for source in parts.sources.values()
            for shape in source.shapes.values()
        )
        self._resident = 4 * sum(sizes) <= RESIDENT_BYTES
        encoder = cast("VisionEncoder", build_module(components["vision_encoder"]))
        table = build_module(components["token_embedding"])
        self.steps: tuple[Step, ...] = (
            *(Step("vision_encoder", stage, _by_tile(stage)) for stage in encoder.stages()),
            Step("token_embedding", Stage("", table), _splice(Stage("", table))),
            *self._decoder_steps(cast("LlamaDecoder", build_module(components["decoder"]))),
        )
        if self._resident:
            for step in self.steps:
                self._load(step, self.published)

    def published(self, component: str, name: str) -> Tensor:
        """A parameter as it was published."""
        return self._sources[component].tensor(name)

    @torch.no_grad()
    def run(self, at: int, passages: Sequence[Passage], states: Sequence[State]) -> list[State]:
        """What a step makes of each passage's state, on published numbers."""
        step = self.steps[at]
        if not self._resident:
            self._load(step, self.published)
        after = [step.run(*each) for each in zip(passages, states, strict=True)]
        self._drop(step)
        return after

    @torch.no_grad()
    def finish(
        self,
        at: int,
        passages: Sequence[Passage],
        states: Sequence[State],
        changed: Sequence[int],
        read: Read,
    ) -> list[NDArray[np.float32]]:
        """The logits `[outputs, V]` of each passage, from the state in front of a step on.

        Args:
            at: The step that is entered.
            passages: What is sent through.
            states: The state of each in front of the step.
            changed: Numbers of the steps that have other parameters than the published.
            read: Reads those.
        """
        now = list(states)
        for number in range(at, len(self.steps)):
            step = self.steps[number]
            if number in changed:
                self._load(step, read)
            elif not self._resident:
                self._load(step, self.published)
            now = [step.run(*each) for each in zip(passages, now, strict=True)]
            if number in changed and self._resident:
                self._load(step, self.published)
            self._drop(step)
        return [state[0].numpy() for state in now]

    def _load(self, step: Step, read: Read) -> None:
        load_stage(step.stage, lambda name: read(step.component, name))

    def _drop(self, step: Step) -> None:
        if not self._resident:
            shapes = self._sources[step.component].shapes
            load_stage(step.stage, lambda name: torch.empty(shapes[name], device="meta"))

    def _decoder_steps(self, decoder: LlamaDecoder) -> Iterator[Step]:
        cos, sin = (self.published("decoder", name) for name in ("cos", "sin"))
        start = torch.zeros(1, dtype=torch.int32)
        *layers, norm, head = decoder.stages()

        def layer(stage: Stage) -> Callable[[Passage, State], State]:
            def run(_: Passage, state: State) -> State:
                cache = torch.zeros(*decoder.cache_shape(state[0].shape[1]))
                return [stage.module(state[0], cache, cache, cos, sin, start)[0]]

            return run

        for stage in layers:
            yield Step("decoder", stage, layer(stage))
        yield Step(
            "decoder", norm, lambda passage, state: [norm.module(state[0][0, -passage.outputs :])]
        )
        yield Step("decoder", head, lambda _, state: [head.module(state[0])])


def _by_tile(stage: Stage) -> Callable[[Passage, State], State]:
    return lambda _, state: [stage.module(tile) for tile in state]


def _splice(table: Stage) -> Callable[[Passage, State], State]:
    """From image tokens of each tile to the embeddings of the whole text."""

    def run(passage: Passage, state: State) -> State:
        embeddings: Tensor = table.module(torch.tensor([passage.ids]))
        embeddings[0, torch.from_numpy(passage.slots)] = torch.cat(state).flatten(0, 1)
        return [embeddings]

    return run


def first_states(passages: Sequence[Passage], pixels: int = 0) -> list[State]:
    """The states in front of the first step.

    Args:
        passages: What is sent through.
        pixels: Tiles of so many numbers may run together; 0 for one at a time.
    """
    states = []
    for passage in passages:
        tiles = torch.from_numpy(passage.tiles)
        states.append(list(torch.split(tiles, max(1, pixels // tiles[0].numel()))))
    return states
