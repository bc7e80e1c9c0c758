"""onnxruntime on the CPU, with buffers bound once and the KV cache updated in place."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

# Read by onnxruntime when it is loaded: from 1.29 on its packages send telemetry without it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import (
    EPFail,
    Fail,
    InvalidArgument,
    InvalidGraph,
    InvalidProtobuf,
    NoSuchFile,
    NotImplemented,
    RuntimeException,
)

from lorgnette.bundle import Bundle
from lorgnette.errors import BundleError
from lorgnette.manifest import CACHE8, ComponentEntry, FunctionEntry
from lorgnette.runtime.engines.engine import Float, OperatorTrace, Tiles

ENGINE_ERRORS = (
    EPFail,
    Fail,
    InvalidArgument,
    InvalidGraph,
    InvalidProtobuf,
    NoSuchFile,
    NotImplemented,
    RuntimeException,
)
_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int8": "tensor(int8)",
    "uint8": "tensor(uint8)",
    "int32": "tensor(int32)",
    "int64": "tensor(int64)",
}
"""What onnxruntime calls the dtypes of a manifest."""


_NEWER = "its KV cache is of 8 bits: update onnxruntime, 1.32 is new enough"
VISION, EMBEDDING, DECODER = "vision_encoder", "token_embedding", "decoder"
GRAPHS = (VISION, EMBEDDING, DECODER)
PREFILL = "prefill"
"""The decoder's graph for many positions at once; opened when there are so many."""
PREFILL_WEIGHTS = "prefill_weights"
"""The graph that makes what that one takes besides; run once."""
MOST_MADE = 8
"""Weights so made take at most so many times the bytes of the bundle's files."""
FIRST_POSITIONS = 512
"""Positions that a new KV cache has room for."""

Made = TypeVar("Made")


class OnnxEngine:
    """The three graphs of a bundle as sessions, loaded side by side.

    Weights are memory-mapped from the bundle by onnxruntime itself.
    """

    def __init__(self, bundle: Bundle, threads: int, profile_folder: Path | None = None) -> None:
        """Starts loading; with a folder to write in, sessions note what each operator takes."""
        self._context_length = bundle.manifest.context_length
        self._decoder_entry = bundle.manifest.component(DECODER)
        self._prefill = _prefill_function(self._decoder_entry)
        self._bundle = bundle
        self._made: Future[dict[str, NDArray[np.generic]]] | None = None
        self._open = partial(_session, bundle, profile_folder=profile_folder)
        self._threads = threads
        self._loading: dict[str, Future[onnxruntime.InferenceSession]] = {}
        self._lock = threading.Lock()
        for component in GRAPHS:
            self._load(component)

    def wait(self) -> None:
        """Returns when every graph is loaded."""
        loading = list(self._loading.values())
        wait(loading)
        for each in loading:
            each.result()

    def encode(self, tiles: Tiles, *, more: bool = False) -> Float:
        """Image tokens of a batch of tiles. Shapes: uint8 `[G, 3, edge, edge]` to `[G, N, D]`."""
        session = self._session(VISION)
        with _running(VISION):
            options = None if more else _giving_memory_back()
            image_tokens: Float = session.run(None, {"tiles": tiles}, options)[0]
        return image_tokens

    def release_vision(self) -> None:
        """Frees the vision encoder; the next picture loads it again."""
        with self._lock:
            self._loading.pop(VISION, None)

    def embed(self, token_ids: NDArray[np.int64]) -> Float:
        """Embeddings of tokens. Shapes: `[T]` to `[T, D]`."""
        session = self._session(EMBEDDING)
        with _running(EMBEDDING):
            embeddings: Float = session.run(None, {"token_ids": token_ids[None]})[0]
        return embeddings[0]  # type: ignore[no-any-return]

    def new_state(self) -> OnnxDecoderState:
        """An empty KV cache of the bundle's context length."""
        return self._state(math.inf if self._prefill is None else self._prefill.positions)

    def new_prefill_state(self) -> OnnxDecoderState | None:
        """The same, every call of which takes the graph for many positions."""
        return None if self._prefill is None else self._state(1)

    def expect(self, positions: int) -> None:
        """Starts loading what so many new positions need and others do not."""
        if self._prefill is not None and positions >= self._prefill.positions:
            self._load(PREFILL)
            self._make_weights()

    def without_prefill_weights(self) -> None:
        """States made from now on run the decoder's own graph, however many positions come."""
        self._prefill = None

    def _state(self, prefill_from: float) -> OnnxDecoderState:
        return OnnxDecoderState(
            self._session,
            lambda: self._make_weights().result(),
            self._decoder_entry,
            self._context_length,
            prefill_from,
        )

    def _make_weights(self) -> Future[dict[str, NDArray[np.generic]]]:
        """Starts making the further inputs of the prefill graph, unless that was done."""
        with self._lock:
            if self._made is None:
                self._made = _in_a_thread(
                    PREFILL_WEIGHTS, partial(_made_weights, self._bundle, self._threads)
                )
            return self._made

    def end_profiling(self) -> list[OperatorTrace]:
        """Ends the notes of what each operator took; only where a folder was given."""
        return [_trace(name, self._session(name)) for name in self._loading]

    def _load(self, name: str) -> Future[onnxruntime.InferenceSession]:
        """Starts loading a graph in a thread of its own, unless that was done."""
        # Looking up a few rows is not worth waking others.
        threads = 1 if name == EMBEDDING else self._threads
        with self._lock:
            if name not in self._loading:
                self._loading[name] = _in_a_thread(name, partial(self._open, name, threads))
            return self._loading[name]

    def _session(self, name: str) -> onnxruntime.InferenceSession:
        """A session, waited for where it is still loading."""
        return self._load(name).result()


def _in_a_thread(name: str, call: Callable[[], Made]) -> Future[Made]:
    """What a call will give, which a thread of its own makes."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"load-{name}")
    made = pool.submit(call)
    pool.shutdown(wait=False)
    return made


def _giving_memory_back() -> onnxruntime.RunOptions:
    """Options of a run behind which the memory it worked in is freed."""
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


class OnnxDecoderState:
    """A KV cache bound as input and output alike, so that graphs write it in place.

    The buffers double when they are full, up to the context length. They are not allocated whole:
    systems with huge pages commit two megabytes where the first position of a head is written,
    which for a long context is nearly all of it, and zeroing that delays the first token.
    """

    def __init__(
        self,
        session: Callable[[str], onnxruntime.InferenceSession],
        weights: Callable[[], dict[str, NDArray[np.generic]]],
        entry: ComponentEntry,
        capacity: int,
        prefill_from: float,
    ) -> None:
        """Allocates nothing yet; sessions are asked for by name when positions come.

        Args:
            session: Gives the session of a graph.
            weights: Gives the further inputs of the prefill graph.
            entry: The decoder's entry.
            capacity: Positions that the cache can grow to.
            prefill_from: The least new positions that the prefill graph is for.
        """
        self.capacity = capacity
        self._open = session
        self._weights = weights
        self._entry = entry
        self._prefill_from = prefill_from
        self._past = np.zeros(1, np.int32)
        self._logits = np.zeros((1, int(entry.outputs[0].shape[1])), np.float32)
        self._caches: list[NDArray[np.generic]] = []
        self._allocated = 0
        self._bindings: dict[str, onnxruntime.IOBinding] = {}

    def run(self, embeddings: Float, past_length: int) -> Float:
        """Appends T positions after `past_length` and gives the logits behind the last.

        Shapes: `embeddings` `[T, D]`; returns `[V]`, valid until the next call.
        """
        count = len(embeddings)
        if past_length + count > self.capacity:
            raise ValueError(f"{past_length} + {count} positions in {self.capacity}")
        name = PREFILL if count >= self._prefill_from else DECODER
        session = self._open(name)
        self._reserve(past_length + count, past_length)
        if name not in self._bindings:
            with _running(name):
                self._bindings[name] = self._bind(
                    session, self._weights if name == PREFILL else dict
                )
        self._past[0] = past_length
        bound = np.ascontiguousarray(embeddings[None])
        _bind(self._bindings[name].bind_input, "embeddings", bound)
        # What hundreds of positions work in is much, and what a token works in little.
        options = _giving_memory_back() if name == PREFILL else None
        with _running(DECODER):
            session.run_with_iobinding(self._bindings[name], options)
        return self._logits[0]  # type: ignore[no-any-return]

    def _bind(
        self,
        session: onnxruntime.InferenceSession,
        further: Callable[[], dict[str, NDArray[np.generic]]],
    ) -> onnxruntime.IOBinding:
        """Binds what stays in its place from call to call, and further inputs."""
        binding = session.io_binding()
        for name, array in further().items():
            _bind(binding.bind_input, name, array)
        _bind(binding.bind_input, "past_length", self._past)
        _bind(binding.bind_output, "logits", self._logits)
        entry = self._entry
        for cache, source, target in zip(
            self._caches, entry.cache_inputs, entry.cache_outputs, strict=True
        ):
            _bind(binding.bind_input, source.name, cache)
            _bind(binding.bind_output, target.name, cache)
        return binding

    def _reserve(self, needed: int, keep: int) -> None:
        """Makes room for `needed` positions, keeping the first `keep`."""
        if needed <= self._allocated:
            return
        doubled = max(FIRST_POSITIONS, 1 << (needed - 1).bit_length())
        self._allocated = min(doubled, self.capacity)
        old, self._caches = self._caches, []
        for index, source in enumerate(self._entry.cache_inputs):
            shape = [self._allocated if axis == "S" else int(axis) for axis in source.shape]
            cache = np.zeros(shape, source.dtype)
            if old:
                kept = old[index][:, :, :keep]
                cache[:, :, : kept.shape[2]] = kept
            self._caches.append(cache)
        self._bindings = {}


def _bind(bind: Callable[..., None], name: str, array: NDArray[np.generic]) -> None:
    bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


@contextmanager
def _running(component: str) -> Iterator[None]:
    """Tells what failed where the engine does while it runs a graph."""
    try:
        yield
    except (*ENGINE_ERRORS, RuntimeError) as error:
        raise BundleError(
            f"onnxruntime {onnxruntime.__version__} failed",
            where=component,
            got=str(error).splitlines()[0],
            hint="run `lorgnette verify` on the bundle",
        ) from error


def _trace(component: str, session: onnxruntime.InferenceSession) -> OperatorTrace:
    started = session.get_profiling_start_time_ns()
    # Some C++ libraries count since the epoch, others as Python's monotonic clock does.
    epoch, monotonic = time.time_ns(), time.monotonic_ns()
    if abs(epoch - started) < abs(monotonic - started):
        started += monotonic - epoch
    return OperatorTrace(
        DECODER if component == PREFILL else component, Path(session.end_profiling()), started
    )


def _prefill_function(decoder: ComponentEntry) -> FunctionEntry | None:
    """The decoder's function for many positions, where it has a graph of its own."""
    return next((each for each in decoder.functions if each.graph), None)


def _session(
    bundle: Bundle, name: str, threads: int, *, profile_folder: Path | None = None
) -> onnxruntime.InferenceSession:
    entry = bundle.manifest.component(DECODER if name.startswith(PREFILL) else name)
    prefill = _prefill_function(entry)
    graphs = {PREFILL: prefill.graph, PREFILL_WEIGHTS: prefill.weights} if prefill else {}
    path = bundle.file(graphs.get(name, entry.graph))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # fatal ones only: errors arrive as exceptions
    if name not in (EMBEDDING, DECODER):
        # Idle threads of theirs would go on spinning beside those of the decoder.
        options.add_session_config_entry("session.force_spinning_stop", "1")
    # A plan of memory for shapes seen before would lie beside what the first run took.
    options.enable_mem_pattern = False
    # Exports write what is to run. More would take longer to load and join layer normalisations
    # with their additions, which is slower. What runs but once computes nothing in advance.
    levels = onnxruntime.GraphOptimizationLevel
    once = name == PREFILL_WEIGHTS
    options.graph_optimization_level = levels.ORT_DISABLE_ALL if once else levels.ORT_ENABLE_BASIC
    if profile_folder is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_folder / name)
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except ENGINE_ERRORS as error:
        raise BundleError(
            f"onnxruntime {onnxruntime.__version__} refuses the graph",
            where=path,
            got=str(error).splitlines()[0],
            hint=_NEWER if CACHE8 in bundle.manifest.requires else None,
        ) from error
    if name != PREFILL_WEIGHTS:
        _check_interface(session, entry, path, has_more=name == PREFILL)
    return session


def _made_weights(bundle: Bundle, threads: int) -> dict[str, NDArray[np.generic]]:
    """Runs the graph that makes the further inputs of the prefill graph, and lets go of it.

    Raises:
        BundleError: They are no arrays of fixed shapes, or far larger than the bundle.
    """
    prefill = _prefill_function(bundle.manifest.component(DECODER))
    if prefill is None or not prefill.weights:
        return {}
    session = _session(bundle, PREFILL_WEIGHTS, threads)
    path = bundle.file(prefill.weights)
    outputs = session.get_outputs()
    dtypes = {type_: np.dtype(name) for name, type_ in _TYPES.items()}
    size = 0
    for output in outputs:
        fixed = all(isinstance(axis, int) and axis > 0 for axis in output.shape)
        if not fixed or output.type not in dtypes:
            raise BundleError(
                "graph of weights gives no arrays of fixed shapes",
                where=f"{path}: {output.name}",
                got=f"{output.type} {output.shape}",
            )
        size += math.prod(output.shape) * dtypes[output.type].itemsize
    most = MOST_MADE * sum(entry.bytes for entry in bundle.manifest.files)
    if size > most:
        raise BundleError(
            "graph of weights makes too much", where=path, got=f"{size} bytes", wanted=f"{most}"
        )
    made = {each.name: np.empty(each.shape, dtypes[each.type]) for each in outputs}
    binding = session.io_binding()
    first_row = np.zeros((), np.int64)
    with _running(PREFILL_WEIGHTS):
        _bind(binding.bind_input, "first_row", first_row)
        for name, array in made.items():
            _bind(binding.bind_output, name, array)
        session.run_with_iobinding(binding)
    return made


def _check_interface(
    session: onnxruntime.InferenceSession, entry: ComponentEntry, path: Path, *, has_more: bool
) -> None:
    """The graph must have the inputs and outputs that the manifest promises.

    One that has more takes further inputs behind them, which are compared where they are bound.
    """
    promised_inputs = (*entry.inputs, *entry.cache_inputs)
    inputs = session.get_inputs()
    for promised, actual in (
        (promised_inputs, inputs[: len(promised_inputs)] if has_more else inputs),
        ((*entry.outputs, *entry.cache_outputs), session.get_outputs()),
    ):
        wanted = [(t.name, _TYPES[t.dtype], list(t.shape)) for t in promised]
        got = [(value.name, value.type, list(value.shape)) for value in actual]
        if wanted != got:
            counts = (f"{len(got)} tensors", f"{len(wanted)} tensors")
            pairs = zip(got, wanted, strict=False)
            differing = next((pair for pair in pairs if pair[0] != pair[1]), counts)
            raise BundleError(
                "graph is not what the manifest says",
                where=path,
                got=differing[0],
                wanted=differing[1],
            )
