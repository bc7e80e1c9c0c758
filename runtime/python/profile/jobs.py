"""What is measured in a process of its own: memory, operators, another number of threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from lorgnette.bundle import Bundle, open_bundle
from lorgnette.errors import RequestError
from lorgnette.runtime.engines import open_profiled_engine
from lorgnette.runtime.engines.engine import ProfiledEngine
from lorgnette.runtime.model import Model, open_model
from lorgnette.runtime.preprocess import prepare
from lorgnette.runtime.profile.answers import (
    ONE_TOKEN,
    QUESTION,
    measure_answer,
    measure_answers,
)
from lorgnette.runtime.profile.bench import Bench, Tell
from lorgnette.runtime.profile.document import Answer, Energy, Memory, Operators, Phases, Threads
from lorgnette.runtime.profile.machine import EnergyMeter
from lorgnette.runtime.profile.memory import no_memory, of_phase
from lorgnette.runtime.profile.noise import NoiseWatch
from lorgnette.runtime.profile.operators import Entry, operator_phases
from lorgnette.runtime.profile.phases import (
    PREFILLS,
    decode,
    fill,
    measure_phases,
    prefill,
    some_ids,
    vision_tile,
)
from lorgnette.runtime.profile.picture import FreshPictures, one_tile, with_preprocess
from lorgnette.runtime.profile.request import Job

OPERATOR_RUNS = 3
DECODE_RUNS = 16
"""Steps are short."""
SWEEP_RUNS = 5


def memory_job(job: Job) -> dict[str, Memory]:
    """Memory of each phase, one after the other, in the process that calls this."""
    opened: list[Model] = []
    found = {"open": of_phase(lambda: opened.append(open_model(job.bundle, threads=job.threads)))}
    model = opened[0]
    spec = model.manifest.preprocess
    pictures = FreshPictures(job.picture, spec.tile_size)
    single = with_preprocess(model, one_tile(spec))
    most = max((n for n in PREFILLS if n <= model.manifest.context_length), default=1)
    state_of = _Prefilled(model, most)
    phases: dict[str, Callable[[], object]] = {
        "one_tile": lambda: _answer(single, pictures),
        "full_tiling": lambda: _answer(model, pictures),
        "prefill": state_of.prefill,
        "decode": state_of.decode,
    }
    for name, run in phases.items():
        try:
            found[name] = of_phase(run)
        except RequestError as error:  # the prompt does not fit the context
            found[name] = no_memory(str(error))
    return found


def operators_job(job: Job, folder: Path) -> Operators:
    """The engine's own profile of each entry point; it is written to a folder that exists."""
    bundle = open_bundle(job.bundle)
    engine = open_profiled_engine(bundle, job.threads, folder)
    if engine is None:
        reason = f"the engine '{bundle.manifest.engine}' has no profiler of operators here"
        return Operators(entry_points=None, reason=reason)
    entries = _run_entries(engine, bundle, job)
    return Operators(entry_points=operator_phases(engine.end_profiling(), entries))


class Warm(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured on a model that is open."""

    answers: dict[str, Answer]
    phases: Phases
    energy: Energy
    calibration_ms: list[float]


def phases_job(job: Job, tell: Tell) -> Warm:
    """First tokens and each phase."""
    tell("open bundle")
    model = open_model(job.bundle, threads=job.threads)
    pictures = FreshPictures(job.picture, model.manifest.preprocess.tile_size)
    watch, meter = NoiseWatch(), EnergyMeter()
    bench = Bench(job.runs, job.seconds, tell, watch, meter)
    return Warm(
        answers=measure_answers(model, bench, pictures),
        phases=measure_phases(model, bench, pictures),
        energy=meter.energy(),
        calibration_ms=watch.calibration_ms,
    )


def sweep_job(job: Job) -> Threads:
    """The main figures with the job's number of threads."""
    model = open_model(job.bundle, threads=job.threads)
    spec = model.manifest.preprocess
    pictures = FreshPictures(job.picture, spec.tile_size)
    single = with_preprocess(model, one_tile(spec))
    bench = Bench(min(job.runs, SWEEP_RUNS), job.seconds)
    return Threads(
        ttft_tile_ms=measure_answer(single, bench, pictures, 1, "").ttft_ms,
        vision_tile_ms=vision_tile(model, bench, pictures),
        prefill_256_tokens_per_s=prefill(model, bench, 256).tokens_per_s,
        decode_256_tokens_per_s=decode(model, bench, 256).tokens_per_s,
    )


class _Prefilled:
    """A KV cache that is filled in one phase and read in the next."""

    def __init__(self, model: Model, positions: int) -> None:
        self._model, self._positions = model, positions

    def prefill(self) -> None:
        self._state = self._model.engine.new_state()
        fill(self._state, self._model.engine.embed(some_ids(self._model, self._positions)))

    def decode(self) -> None:
        for _ in range(DECODE_RUNS):
            embeddings = self._model.engine.embed(np.array([0], np.int64))
            self._state.run(embeddings, self._positions - 1)


def _answer(model: Model, pictures: FreshPictures) -> object:
    """A conversation after its first token: its KV cache is in use."""
    chat = model.chat()
    chat.send(QUESTION, [pictures.take()], ONE_TOKEN).result()
    return chat


def _run_entries(engine: ProfiledEngine, bundle: Bundle, job: Job) -> dict[str, Entry]:
    """Runs each entry point, the first time unseen."""
    manifest = bundle.manifest
    positions = min(256, manifest.context_length)
    ids = np.random.default_rng(0).integers(0, manifest.spec.text.vocab_size, positions)
    tiles = prepare(
        FreshPictures(job.picture, manifest.preprocess.tile_size).take(),
        one_tile(manifest.preprocess),
    ).pixels
    embeddings = engine.embed(ids)
    state = engine.new_state()
    last = np.ascontiguousarray(embeddings[-1:])
    runs: dict[str, tuple[str, str, int, Callable[[], object]]] = {
        "encode": ("vision_encoder", "1 tile", OPERATOR_RUNS, lambda: engine.encode(tiles)),
        "embed": (
            "token_embedding",
            f"{positions} tokens",
            OPERATOR_RUNS,
            lambda: engine.embed(ids),
        ),
        "prefill": (
            "decoder",
            f"{positions} positions",
            OPERATOR_RUNS,
            lambda: fill(state, embeddings),
        ),
        "decode": (
            "decoder",
            f"1 token, context {positions}",
            DECODE_RUNS,
            lambda: state.run(last, positions - 1),
        ),
    }
    entries = {}
    for name, (component, what, count, run) in runs.items():
        run()
        entry = entries[name] = Entry(component, what, [])
        for _ in range(count):
            start_ns = time.monotonic_ns()
            run()
            entry.note(start_ns)
    return entries
