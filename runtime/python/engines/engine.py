"""What the runtime asks of an engine, whatever it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]
Tiles = NDArray[np.uint8]


class DecoderState(Protocol):
    """A KV cache and the decoder that reads and writes it."""

    capacity: int
    """Positions S that the cache can hold."""

    def run(self, embeddings: Float, past_length: int) -> Float:
        """Appends T positions after `past_length` and gives the logits behind the last.

        Positions from `past_length` on are overwritten, so a cache is cut back by passing less.

        Shapes: `embeddings` `[T, D]`; returns `[V]`, valid until the next call.
        """


class Engine(Protocol):
    """Executes the components of one bundle."""

    def wait(self) -> None:
        """Returns when everything is loaded; what was refused is told here or at first use."""

    def encode(self, tiles: Tiles, *, more: bool = False) -> Float:
        """Image tokens of a batch of tiles.

        With `more`, other tiles follow at once, and working memory may be kept for them.

        Shapes: uint8 `[G, 3, edge, edge]` to `[G, N, D]`.
        """

    def release_vision(self) -> None:
        """Frees the vision encoder where it lies apart from the rest, until the next picture."""

    def embed(self, token_ids: NDArray[np.int64]) -> Float:
        """Embeddings of tokens. Shapes: `[T]` to `[T, D]`."""

    def new_state(self) -> DecoderState:
        """An empty KV cache of the bundle's context length."""

    def new_prefill_state(self) -> DecoderState | None:
        """The same, every call of which takes the graph that is there for many positions.

        None where one graph serves every length. States of `new_state` choose by themselves.
        """

    def expect(self, positions: int) -> None:
        """Told how many new positions come before they do: what they need may be loaded by then."""

    def without_prefill_weights(self) -> None:
        """Told before the first prompt to make no second form of weights for long ones."""


class OperatorTrace(NamedTuple):
    """What an engine wrote down about the operators that it ran."""

    component: str
    path: Path
    """Chrome's trace format: events of `cat` "Node" with `ts` and `dur` in microseconds."""
    start_ns: int
    """What `time.monotonic_ns` was when `ts` was 0."""


class ProfiledEngine(Engine, Protocol):
    """An engine that was opened to tell what each operator takes; not every kind can."""

    def end_profiling(self) -> Sequence[OperatorTrace]:
        """Ends it and gives a trace of each graph; once."""


class WholeEngine:
    """An engine that loads everything when it is made, and keeps it."""

    def wait(self) -> None:
        """Everything is loaded."""

    def release_vision(self) -> None:
        """Nothing lies apart."""

    def new_prefill_state(self) -> DecoderState | None:
        """One graph serves every length, or the engine's own choice is not to be had apart."""
        return None

    def expect(self, positions: int) -> None:
        """Everything is loaded."""

    def without_prefill_weights(self) -> None:
        """There is but one form."""
