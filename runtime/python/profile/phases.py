"""Each phase alone, on a model that is open and warm."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from lorgnette.runtime.chat import PREFILL_CHUNK
from lorgnette.runtime.engines.engine import DecoderState, Float
from lorgnette.runtime.generation import GREEDY
from lorgnette.runtime.model import Model
from lorgnette.runtime.pictures import PictureCache, encode_pictures
from lorgnette.runtime.preprocess import prepare
from lorgnette.runtime.profile.answers import ONE_TILE_ONLY
from lorgnette.runtime.profile.bench import Bench
from lorgnette.runtime.profile.document import Decode, Figure, Phases, Prefill
from lorgnette.runtime.profile.picture import FreshPictures, one_tile, tile_count
from lorgnette.runtime.profile.stats import figure, rates, timed, unknown
from lorgnette.runtime.sampler import Sampler

PREFILLS = (64, 256, 1024)
"""New positions."""
DECODES = (256, 1024)
"""Positions of the context behind the step."""
STEPS = 64
"""The most steps of one decode figure, unless more runs were asked for."""
EMBEDDED = 256
NO_PROJECTOR = "the projector is inside the graph of the vision encoder"


def measure_phases(model: Model, bench: Bench, pictures: FreshPictures) -> Phases:
    """Every phase.

    Args:
        model: The model.
        bench: Repeats the runs.
        pictures: Gives each run its picture.
    """
    spec = model.manifest.preprocess
    single = one_tile(spec)
    tiles = tile_count(pictures, spec)

    def preprocess_tile() -> float:
        picture = pictures.take()
        return timed(lambda: prepare(picture, single))

    def preprocess_full() -> float:
        picture = pictures.take()
        return timed(lambda: prepare(picture, spec))

    many = unknown(ONE_TILE_ONLY) if tiles == 1 else None
    return Phases(
        preprocess_tile_ms=figure(bench.samples("preprocess, one tile", preprocess_tile)),
        preprocess_full_ms=many
        or figure(bench.samples(f"preprocess, {tiles} tiles", preprocess_full)),
        vision_tile_ms=vision_tile(model, bench, pictures),
        vision_full_ms=many or vision_full(model, bench, pictures, tiles),
        projector_ms=unknown(NO_PROJECTOR),
        embedding_token_ms=embedding(model, bench, 1),
        embedding_256_ms=embedding(model, bench, EMBEDDED),
        prefill={str(count): prefill(model, bench, count) for count in PREFILLS},
        decode={str(context): decode(model, bench, context) for context in DECODES},
    )


def vision_tile(model: Model, bench: Bench, pictures: FreshPictures) -> Figure:
    """One call of the vision encoder on one tile."""
    single = one_tile(model.manifest.preprocess)

    def run() -> float:
        pixels = prepare(pictures.take(), single).pixels
        return timed(lambda: model.engine.encode(pixels))

    return figure(bench.samples("vision, a tile", run))


def vision_full(model: Model, bench: Bench, pictures: FreshPictures, tiles: int) -> Figure:
    """All tiles of a picture, in the calls that the runtime makes."""

    def run() -> float:
        prepared = prepare(pictures.take(), model.manifest.preprocess)
        cache = PictureCache()
        return timed(lambda: encode_pictures(model.engine, [prepared], cache, _go_on))

    return figure(bench.samples(f"vision, {tiles} tiles", run))


def embedding(model: Model, bench: Bench, count: int) -> Figure:
    """Looking up tokens."""
    ids = some_ids(model, count)
    name = f"embedding, {count} token{'s' if count > 1 else ''}"
    return figure(bench.samples(name, lambda: timed(lambda: model.engine.embed(ids))))


def prefill(model: Model, bench: Bench, count: int) -> Prefill:
    """New positions behind an empty cache, in the calls that the runtime makes."""
    reason = no_room(model, count)
    if reason:
        return Prefill(ms=unknown(reason), tokens_per_s=unknown(reason))
    state = model.engine.new_state()
    embeddings = model.engine.embed(some_ids(model, count))
    samples = bench.samples(
        f"prefill, {count} positions", lambda: timed(lambda: fill(state, embeddings))
    )
    return Prefill(ms=figure(samples), tokens_per_s=rates(samples, count))


def decode(model: Model, bench: Bench, context: int) -> Decode:
    """The step that makes the context so long, as the runtime makes it, again and again."""
    reason = no_room(model, context)
    if reason:
        none = unknown(reason)
        return Decode(
            token_ms=none, embedding_ms=none, decoder_ms=none, sampling_ms=none, tokens_per_s=none
        )
    ids = some_ids(model, context)
    state = model.engine.new_state()
    fill(state, model.engine.embed(ids[:-1]))
    step = _Step(model, state, ids)
    runs = max(STEPS, bench.runs) if bench.runs > 1 else 1
    samples = bench.samples(f"decode, context {context}", step.run, runs)
    parts = [
        figure(part[-len(samples) :]) for part in (step.embedding, step.decoder, step.sampling)
    ]
    return Decode(
        token_ms=figure(samples),
        embedding_ms=parts[0],
        decoder_ms=parts[1],
        sampling_ms=parts[2],
        tokens_per_s=rates(samples, 1),
    )


class _Step:
    """A decode step whose parts are timed."""

    def __init__(self, model: Model, state: DecoderState, ids: NDArray[np.int64]) -> None:
        self.embedding: list[float] = []
        self.decoder: list[float] = []
        self.sampling: list[float] = []
        self._model = model
        self._state = state
        self._ids = [int(each) for each in ids]
        self._sampler = Sampler(GREEDY, model.manifest.spec.text.vocab_size)
        self._token = self._ids[-1]

    def run(self) -> float:
        """One step; its milliseconds."""
        times = [time.perf_counter()]
        embeddings = self._model.engine.embed(np.array([self._token], np.int64))
        times.append(time.perf_counter())
        logits = self._state.run(embeddings, len(self._ids) - 1)
        times.append(time.perf_counter())
        self._token = self._sampler.next(logits, self._ids)
        times.append(time.perf_counter())
        parts = (self.embedding, self.decoder, self.sampling)
        for part, start, end in zip(parts, times, times[1:], strict=False):
            part.append((end - start) * 1e3)
        return (times[-1] - times[0]) * 1e3


def fill(state: DecoderState, embeddings: Float) -> None:
    """Prefills an empty cache as a conversation does.

    Shapes:
        embeddings `[T, D]`
    """
    for start in range(0, len(embeddings), PREFILL_CHUNK):
        state.run(embeddings[start : start + PREFILL_CHUNK], start)


def some_ids(model: Model, count: int) -> NDArray[np.int64]:
    """Ids of tokens, the same ones each time. Shapes: `[count]`."""
    most = min(model.manifest.spec.text.vocab_size, model.tokenizer.vocab_size)
    return np.random.default_rng(0).integers(0, most, count, dtype=np.int64)


def no_room(model: Model, count: int) -> str:
    """Why so many positions cannot be measured, empty where they can."""
    most = model.manifest.context_length
    return "" if count <= most else f"the bundle's context ends at {most} positions"


def _go_on() -> None:
    """Stops nothing."""
