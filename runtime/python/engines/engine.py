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

    def encode(self, tiles: Tiles) -> Float:
        """Image tokens of a batch of tiles. Shapes: uint8 `[G, 3, edge, edge]` to `[G, N, D]`."""

    def embed(self, token_ids: NDArray[np.int64]) -> Float:
        """Embeddings of tokens. Shapes: `[T]` to `[T, D]`."""

    def new_state(self) -> DecoderState:
        """An empty KV cache of the bundle's context length."""


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
