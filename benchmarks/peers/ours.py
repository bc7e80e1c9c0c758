"""Our own runtime, by the calls that an app makes."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.peers.peer import Case, Engine, Peer, main

if TYPE_CHECKING:
    from lorgnette.runtime.model import Model

PEER = Peer(
    name="ours",
    module="benchmarks.peers.ours",
    rows=("ours",),
    formats={"ours": "lorgnette, onnx-cpu, the bundle given (int4-fast where none is)"},
)


class OurEngine:
    """Pictures go through a conversation; prefill and decode through the engine alone."""

    def __init__(self, case: Case, threads: int) -> None:
        """Opens the bundle as `lorgnette run` does: a picture may come while graphs still load."""
        import numpy as np

        from lorgnette.runtime.generation import Request
        from lorgnette.runtime.model import open_model

        self.case = case
        self._model = open_model(case.bundle, threads=threads, wait=False)
        self._request = Request(max_new_tokens=1)
        self._pictures = np.random.default_rng(0)
        self._tile = self._pictures.integers(0, 256, (1, 3, case.tile, case.tile), np.uint8)
        self._state = self._model.engine.new_state()
        self._filled = 0

    def encode(self) -> None:
        """One tile."""
        self._model.engine.encode(self._tile)

    def start(self) -> None:
        """A new KV cache, as each conversation has."""
        self._state = self._model.engine.new_state()
        self._filled = 0

    def prefill(self, ids: list[int]) -> int:
        """In chunks, as a conversation does it."""
        import numpy as np

        from lorgnette.runtime.chat import PREFILL_CHUNK

        logits = None
        for first in range(0, len(ids), PREFILL_CHUNK):
            part = np.array(ids[first : first + PREFILL_CHUNK], np.int64)
            logits = self._state.run(self._model.engine.embed(part), self._filled)
            self._filled += len(part)
        return int(np.argmax(logits))  # type: ignore[arg-type]

    def decode(self, token: int) -> int:
        """One id."""
        return self.prefill([token])

    def answer(self, tiles: int) -> float | None:
        """A new picture each time: an encoded one would come from the cache.

        Preprocessing is taken off: peers are given prepared tiles.
        """
        import numpy as np

        edge = self.case.tile
        picture = self._pictures.integers(0, 256, (edge, edge, 3), np.uint8)
        self._chat = (self._model if tiles > 1 else self._one_tile()).chat()
        result = self._chat.send(self.case.question, [picture], self._request).result()
        wanted = len(self.case.prompts[str(tiles)])
        if (result.tiles, result.prompt_tokens) != (tiles, wanted):
            raise RuntimeError(f"{result.tiles} tiles and {result.prompt_tokens} ids: not {wanted}")
        return result.timings.ttft - result.timings.preprocess

    def second(self) -> float | None:
        """A further question in the same conversation."""
        return self._chat.send(self.case.further, (), self._request).result().timings.ttft

    def _one_tile(self) -> Model:
        """The same engine behind a manifest that makes one tile of a picture."""
        from msgspec.structs import replace

        model = copy.copy(self._model)
        manifest = model.manifest
        if hasattr(manifest.preprocess, "longest_edge"):
            one = replace(manifest.preprocess, longest_edge=self.case.tile)
            model.bundle = dataclasses.replace(
                model.bundle, manifest=replace(manifest, preprocess=one)
            )
        return model


def convert(row: str, case: Case, folder: Path) -> None:
    """Nothing: the driver exports the bundle, from which it also has the ids."""


def load(row: str, case: Case, folder: Path, threads: int) -> Engine:
    """Opens the bundle."""
    return OurEngine(case, threads)


if __name__ == "__main__":
    main(convert, load)
