"""Core AI: the assets of a bundle, run by Apple's library for Linux and macOS.

The library compiles an asset for this machine when it is opened and keeps the result in memory.
How many threads it computes with cannot be said.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from collections.abc import Coroutine, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from coreai._compiler.ir import MLIRError, Module  # type: ignore[attr-defined]
from coreai.authoring import AIModelAsset, Context
from coreai.runtime import InferenceFunction, InferenceFunctionDescriptor, NDArrayDescriptor
from coreai.runtime import NDArray as CoreArray
from numpy.typing import NDArray

from lorgnette.bundle import Bundle, sha256_of
from lorgnette.errors import BundleError
from lorgnette.manifest import FunctionEntry, TensorEntry
from lorgnette.runtime.engines.engine import Float, Tiles, WholeEngine

Result = TypeVar("Result")
FIRST_POSITIONS = 512
"""Positions that a new KV cache has room for."""
TENSORS = {
    "encode": {"tiles", "image_tokens"},
    "embed": {"token_ids", "embeddings"},
    "prefill": {"embeddings", "past_length", "logits"},
    "decode": {"embeddings", "past_length", "logits"},
}
"""What the functions take and give, besides states."""
PROGRAM = "main.mlirb"
BYTECODE = b"ML\xefR"
ENGINE_ERRORS = (RuntimeError, ValueError, KeyError, OSError)
"""What the library raises where an asset or a call is not as it should be."""


class CoreAiEngine(WholeEngine):
    """The functions of a bundle's assets."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        """Compiles the assets; `threads` is not listened to."""
        self._bundle = bundle
        self._loop = _Loop()
        self._entries: dict[str, FunctionEntry] = {}
        self._functions: dict[str, InferenceFunction] = {}
        by_graph: dict[str, list[FunctionEntry]] = {}
        for component in bundle.manifest.components:
            by_graph.setdefault(component.graph, []).extend(component.functions)
        for graph, entries in by_graph.items():
            self._open(graph, entries)
        for name, tensors in TENSORS.items():
            entry = self._entries.get(name)
            found = {tensor.name for tensor in (*entry.inputs, *entry.outputs)} if entry else set()
            if found != tensors:
                raise BundleError(
                    f"the entry point '{name}' does not have the right inputs and outputs",
                    where=bundle.path / "manifest.json",
                    got=", ".join(sorted(found)) or "no function",
                    wanted=", ".join(sorted(tensors)),
                )

    def encode(self, tiles: Tiles, *, more: bool = False) -> Float:
        """Image tokens of a batch of tiles. Shapes: uint8 `[G, 3, edge, edge]` to `[G, N, D]`."""
        tokens = [self._call("encode", {"tiles": tile[None]})["image_tokens"] for tile in tiles]
        return np.concatenate(tokens)

    def embed(self, token_ids: NDArray[np.int64]) -> Float:
        """Embeddings of tokens. Shapes: `[T]` to `[T, D]`."""
        narrow = token_ids[None].astype(np.int32)
        embeddings: Float = self._call("embed", {"token_ids": narrow})["embeddings"][0]
        return embeddings.copy()

    def new_state(self) -> CoreAiDecoderState:
        """An empty KV cache of the bundle's context length."""
        return CoreAiDecoderState(
            self, self._entries["prefill"].states, self._bundle.manifest.context_length
        )

    def decode(self, embeddings: Float, past_length: int, states: dict[str, CoreArray]) -> Float:
        """Runs T positions, which are written to the states. Shapes: `[T, D]` to `[V]`."""
        inputs = {
            "embeddings": np.ascontiguousarray(embeddings[None]),
            "past_length": np.array([past_length], np.int32),
        }
        name = "decode" if len(embeddings) == 1 else "prefill"
        return self._call(name, inputs, states)["logits"][0]  # type: ignore[no-any-return]

    def _open(self, graph: str, entries: Sequence[FunctionEntry]) -> None:
        path = self._bundle.folder(graph)
        _check_files(self._bundle, graph)
        _check_program(path / PROGRAM)

        async def load() -> list[InferenceFunction]:
            asset = AIModelAsset.load(path)
            # Functions hold what they need; the files of the compiled asset may go.
            async with asset.executable() as model:
                with _silent():
                    return [model.load_function(entry.name) for entry in entries]

        try:
            functions = self._loop.run(load())
        except ENGINE_ERRORS as error:
            raise BundleError(
                f"coreai-core {version('coreai-core')} refuses the asset",
                where=path,
                got=_one_line(error),
            ) from error
        for entry, function in zip(entries, functions, strict=True):
            _check_interface(function.desc, entry, path)
            self._entries[entry.entry_point] = entry
            self._functions[entry.entry_point] = function

    def _call(
        self,
        entry_point: str,
        inputs: dict[str, NDArray[Any]],
        states: dict[str, CoreArray] | None = None,
    ) -> dict[str, NDArray[Any]]:
        arrays: dict[str, Any] = {name: CoreArray(array) for name, array in inputs.items()}
        try:
            outputs: dict[str, Any] = self._loop.run(self._functions[entry_point](arrays, states))
            return {name: array.numpy() for name, array in outputs.items()}
        except ENGINE_ERRORS as error:
            raise BundleError(
                f"coreai-core {version('coreai-core')} failed",
                where=entry_point,
                got=_one_line(error),
                hint="run `lorgnette verify` on the bundle",
            ) from error


class CoreAiDecoderState:
    """A KV cache: states that the functions write in place.

    They double when they are full, up to the context length, so that a short answer of a model
    with a long context takes little memory.
    """

    def __init__(self, engine: CoreAiEngine, tensors: Sequence[TensorEntry], capacity: int) -> None:
        """Starts with an empty cache."""
        self.capacity = capacity
        self._engine = engine
        self._tensors = tensors
        self._states: dict[str, CoreArray] = {}
        self._allocated = 0

    def run(self, embeddings: Float, past_length: int) -> Float:
        """Appends T positions after `past_length` and gives the logits behind the last.

        Shapes: `embeddings` `[T, D]`; returns `[V]`, valid until the next call.
        """
        needed = past_length + len(embeddings)
        if needed > self.capacity:
            raise ValueError(f"{past_length} + {len(embeddings)} positions in {self.capacity}")
        self._reserve(needed, past_length)
        return self._engine.decode(embeddings, past_length, self._states)

    def _reserve(self, needed: int, keep: int) -> None:
        """Makes room for `needed` positions, keeping the first `keep`."""
        if needed <= self._allocated:
            return
        doubled = max(FIRST_POSITIONS, 1 << (needed - 1).bit_length())
        self._allocated = min(doubled, self.capacity)
        for tensor in self._tensors:
            shape = [self._allocated if isinstance(a, str) else a for a in tensor.shape]
            grown = np.zeros(shape, tensor.dtype)
            if tensor.name in self._states:
                kept = self._states[tensor.name].numpy()[:, :, :keep]
                grown[:, :, : kept.shape[2]] = kept
            self._states[tensor.name] = CoreArray(grown)


class _Loop:
    """An event loop in a thread of its own, so that it runs beside any loop of the caller."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="coreai", daemon=True).start()
        weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)

    def run(self, task: Coroutine[Any, Any, Result]) -> Result:
        """Waits for what a coroutine gives."""
        future = asyncio.run_coroutine_threadsafe(task, self._loop)
        try:
            return future.result()
        except BaseException:  # an interrupt of the user's as well
            future.cancel()
            raise


def _check_files(bundle: Bundle, graph: str) -> None:
    """Compares an asset's files with their digests: the library may not survive damaged ones."""
    for entry in bundle.manifest.files:
        if not entry.path.startswith(f"{graph}/"):
            continue
        digest = sha256_of(bundle.path / entry.path)
        if digest != entry.sha256:
            raise BundleError(
                f"file '{entry.path}' was changed or damaged",
                where=bundle.path,
                got=f"sha256 {digest[:12]}…",
                wanted=f"{entry.sha256[:12]}…",
                hint="copy or export the bundle again",
            )


def _check_program(path: Path) -> None:
    """Parses a program: the library ends the process where it loads one that is broken."""
    data = path.read_bytes() if path.is_file() else b""
    got = "no program in Core AI's bytecode"
    if data.startswith(BYTECODE):
        try:
            Module.parse(data, Context()._mlir_context)
        except MLIRError as error:
            got = _one_line(error)
        else:
            return
    raise BundleError("the program is damaged", where=path, got=got)


def _check_interface(found: InferenceFunctionDescriptor, entry: FunctionEntry, path: Path) -> None:
    """The function must take and give what the manifest promises."""
    for promised, names, describe in (
        (entry.inputs, found.input_names, found.input_descriptor),
        (entry.outputs, found.output_names, found.output_descriptor),
        (entry.states, found.state_names, found.state_descriptor),
    ):
        wanted = sorted(map(_text, promised))
        got = sorted(_described(name, describe(name)) for name in names)
        if wanted != got:
            counts = (f"{len(got)} tensors", f"{len(wanted)} tensors")
            pairs = zip(got, wanted, strict=False)
            differing = next((pair for pair in pairs if pair[0] != pair[1]), counts)
            raise BundleError(
                f"function '{entry.name}' is not what the manifest says",
                where=path,
                got=differing[0],
                wanted=differing[1],
            )


def _text(tensor: TensorEntry) -> str:
    axes = [-1 if isinstance(axis, str) else axis for axis in tensor.shape]
    return f"{tensor.name} {tensor.dtype} {axes}"


def _described(name: str, tensor: NDArrayDescriptor) -> str:
    return f"{name} {tensor.dtype} {[-1 if axis is None else axis for axis in tensor.shape]}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Drops what the library writes to stderr by itself whenever a function is loaded."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
