"""onnxruntime on the CPU, with buffers bound once and the KV cache updated in place."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

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
from lorgnette.manifest import CACHE8, ComponentEntry
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
FIRST_POSITIONS = 512
"""Positions that a new KV cache has room for."""


class OnnxEngine:
    """The three graphs of a bundle as sessions.

    Weights are memory-mapped from the bundle by onnxruntime itself.
    """

    def __init__(self, bundle: Bundle, threads: int, profile_folder: Path | None = None) -> None:
        """Creates the sessions; with a folder to write in, they note what each operator takes."""
        self._context_length = bundle.manifest.context_length
        self._decoder_entry = bundle.manifest.component("decoder")
        # One thread: looking up a few rows is not worth waking others.
        self._embedding = _session(bundle, "token_embedding", 1, profile_folder)
        self._decoder = _session(bundle, "decoder", threads, profile_folder)
        self._vision = _session(bundle, "vision_encoder", threads, profile_folder)

    def encode(self, tiles: Tiles) -> Float:
        """Image tokens of a batch of tiles. Shapes: uint8 `[G, 3, edge, edge]` to `[G, N, D]`."""
        with _running("vision_encoder"):
            image_tokens: Float = self._vision.run(None, {"tiles": tiles})[0]
        return image_tokens

    def embed(self, token_ids: NDArray[np.int64]) -> Float:
        """Embeddings of tokens. Shapes: `[T]` to `[T, D]`."""
        with _running("token_embedding"):
            embeddings: Float = self._embedding.run(None, {"token_ids": token_ids[None]})[0]
        return embeddings[0]  # type: ignore[no-any-return]

    def new_state(self) -> OnnxDecoderState:
        """An empty KV cache of the bundle's context length."""
        return OnnxDecoderState(self._decoder, self._decoder_entry, self._context_length)

    def end_profiling(self) -> list[OperatorTrace]:
        """Ends the notes of what each operator took; only where a folder was given."""
        sessions = {
            "vision_encoder": self._vision,
            "token_embedding": self._embedding,
            "decoder": self._decoder,
        }
        return [_trace(component, session) for component, session in sessions.items()]


class OnnxDecoderState:
    """A KV cache bound as input and output alike, so that the graph writes it in place.

    The buffers double when they are full, up to the context length. They are not allocated whole:
    systems with huge pages commit two megabytes where the first position of a head is written,
    which for a long context is nearly all of it, and zeroing that delays the first token.
    """

    def __init__(
        self, session: onnxruntime.InferenceSession, entry: ComponentEntry, capacity: int
    ) -> None:
        """Allocates and binds."""
        self.capacity = capacity
        self._session = session
        self._binding = session.io_binding()
        self._past = np.zeros(1, np.int32)
        self._bind_input("past_length", self._past)
        self._entry = entry
        self._caches: list[NDArray[np.generic]] = []
        self._allocated = 0
        self._reserve(1, 0)
        self._logits = np.zeros((1, int(entry.outputs[0].shape[1])), np.float32)
        self._bind_output("logits", self._logits)

    def run(self, embeddings: Float, past_length: int) -> Float:
        """Appends T positions after `past_length` and gives the logits behind the last.

        Shapes: `embeddings` `[T, D]`; returns `[V]`, valid until the next call.
        """
        if past_length + len(embeddings) > self.capacity:
            raise ValueError(f"{past_length} + {len(embeddings)} positions in {self.capacity}")
        self._reserve(past_length + len(embeddings), past_length)
        self._past[0] = past_length
        bound = np.ascontiguousarray(embeddings[None])
        self._bind_input("embeddings", bound)
        with _running("decoder"):
            self._session.run_with_iobinding(self._binding)
        return self._logits[0]  # type: ignore[no-any-return]

    def _reserve(self, needed: int, keep: int) -> None:
        """Makes room for `needed` positions, keeping the first `keep`."""
        if needed <= self._allocated:
            return
        doubled = max(FIRST_POSITIONS, 1 << (needed - 1).bit_length())
        self._allocated = min(doubled, self.capacity)
        old, self._caches = self._caches, []
        pairs = zip(self._entry.cache_inputs, self._entry.cache_outputs, strict=True)
        for index, (source, target) in enumerate(pairs):
            shape = [self._allocated if axis == "S" else int(axis) for axis in source.shape]
            cache = np.zeros(shape, source.dtype)
            if old:
                kept = old[index][:, :, :keep]
                cache[:, :, : kept.shape[2]] = kept
            self._caches.append(cache)
            self._bind_input(source.name, cache)
            self._bind_output(target.name, cache)

    def _bind_input(self, name: str, array: NDArray[np.generic]) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def _bind_output(self, name: str, array: NDArray[np.generic]) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


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
    return OperatorTrace(component, Path(session.end_profiling()), started)


def _session(
    bundle: Bundle, component: str, threads: int, profile_folder: Path | None = None
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # fatal ones only: errors arrive as exceptions
    # Exports write what is to run. More would take longer to load and join layer normalisations
    # with their additions, which is slower.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if profile_folder is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_folder / component)
    path = bundle.file(bundle.manifest.component(component).graph)
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
    _check_interface(session, bundle.manifest.component(component), path)
    return session


def _check_interface(
    session: onnxruntime.InferenceSession, entry: ComponentEntry, path: Path
) -> None:
    """The graph must have the inputs and outputs that the manifest promises."""
    for promised, actual in (
        ((*entry.inputs, *entry.cache_inputs), session.get_inputs()),
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
