"""ExecuTorch on the CPU: the methods of one `.pte`, its KV cache inside the loaded decoder."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lorgnette.bundle import Bundle
from lorgnette.errors import BundleError, MissingExtraError
from lorgnette.runtime.engines.engine import Float, Tiles

if TYPE_CHECKING:
    from lorgnette.manifest import TensorEntry

LIBRARIES = (
    "extension/llm/custom_ops/libcustom_ops_aot_lib",
    "kernels/quantized/libquantized_ops_aot_lib",
)
"""Operators of the KV cache and of coded tables, which no module of the package loads by itself."""
SCALARS = {"uint8": 0, "int64": 4, "float32": 6}
"""Numbers of dtypes in executorch's scalar_type.h."""
KINDS = ("keys", "values")
_LOADING = threading.Lock()


class ExecutorchEngine:
    """The three methods of a bundle's file.

    Each is loaded from a program of its own: methods of one program share their memory, and the
    KV cache is part of it.
    """

    def __init__(self, bundle: Bundle, threads: int) -> None:
        """Loads the methods; the number of threads is one for the whole process."""
        manifest = bundle.manifest
        runtime = _runtime()
        with _quiet():
            runtime._unsafe_reset_threadpool(threads)
        self._methods = {}
        for component in ("vision_encoder", "token_embedding", "decoder"):
            path = bundle.file(manifest.component(component).graph)
            function = manifest.component(component).functions[0]
            self._methods[component] = _Method(runtime, path, function)
        layers = manifest.spec.text.layers
        self._decoder = _Decoder(self._methods["decoder"], layers, manifest.context_length)

    def encode(self, tiles: Tiles) -> Float:
        """Image tokens of a batch of tiles. Shapes: uint8 `[G, 3, edge, edge]` to `[G, N, D]`."""
        return np.concatenate([self._methods["vision_encoder"](tile[None]) for tile in tiles])

    def embed(self, token_ids: NDArray[np.int64]) -> Float:
        """Embeddings of tokens. Shapes: `[T]` to `[T, D]`."""
        found: Float = self._methods["token_embedding"](token_ids[None])[0]
        return found

    def new_state(self) -> ExecutorchDecoderState:
        """An empty KV cache of the bundle's context length."""
        return ExecutorchDecoderState(self._decoder)


class ExecutorchDecoderState:
    """A KV cache, which lies inside the decoder while it is the last that ran.

    Nothing is copied while one state runs. Where another runs in between, the positions in use are
    copied out and back in: for a context of 1000 positions of SmolVLM-256M 46 MB either way. A
    decoder of its own for each state would pack its weights again.
    """

    def __init__(self, decoder: _Decoder) -> None:
        """Starts empty."""
        self.capacity = decoder.capacity
        self.length = 0
        """Positions in use."""
        self.kept: list[NDArray[np.float32]] = []
        """What was copied out: keys and values, layer by layer, `[1, length, Hkv, Dh]`."""
        self._decoder = decoder

    def run(self, embeddings: Float, past_length: int) -> Float:
        """Appends T positions after `past_length` and gives the logits behind the last.

        Shapes: `embeddings` `[T, D]`; returns `[V]`, valid until the next call.
        """
        if past_length + len(embeddings) > self.capacity:
            raise ValueError(f"{past_length} + {len(embeddings)} positions in {self.capacity}")
        return self._decoder.run(self, embeddings, past_length)


class _Decoder:
    """The loaded decoder and the state that is in it."""

    def __init__(self, method: _Method, layers: int, capacity: int) -> None:
        self.capacity = capacity
        self._method = method
        self._lock = threading.Lock()
        self._inside: ExecutorchDecoderState | None = None
        names = [f"layers.{i}.attention.{kind}" for i in range(layers) for kind in KINDS]
        self._caches = [method.attribute(name) for name in names]
        for cache, entry in zip(self._caches, method.states, strict=True):
            if tuple(cache.shape) != entry.shape or cache.dtype != np.float32:
                raise method.differs(f"{entry.name} {list(cache.shape)}", f"{list(entry.shape)}")

    def run(self, state: ExecutorchDecoderState, embeddings: Float, past_length: int) -> Float:
        with self._lock:
            if self._inside is not state:
                self._swap(state, past_length)
            positions = np.array([past_length], np.int64)
            logits: Float = self._method(embeddings[None], positions)[0]
            state.length = past_length + len(embeddings)
            return logits

    def _swap(self, state: ExecutorchDecoderState, past_length: int) -> None:
        """Copies out the state that is inside, and in the first positions of another."""
        old = self._inside
        self._inside = None  # none is whole until the copies are made
        if old is not None:
            old.kept = [cache[:, : old.length].copy() for cache in self._caches]
        for cache, kept in zip(self._caches, state.kept, strict=False):
            cache[:, :past_length] = kept[:, :past_length]
        state.kept = []
        self._inside = state


class _Method:
    """A method of a program of its own, with what the manifest says of it."""

    def __init__(self, runtime: Any, path: Path, function: Any) -> None:
        import torch

        self._torch, self._path, self._name = torch, path, function.name
        self.states: Sequence[TensorEntry] = function.states
        with _quiet() as said:
            try:
                self._program = runtime._load_program(
                    str(path), program_verification=runtime.Verification.InternalConsistency
                )
                self._check(self._program.method_meta(self._name), function)
                self._method = self._program.load_method(self._name)
            except (RuntimeError, MemoryError, IndexError, ValueError) as error:
                raise BundleError(
                    "executorch refuses the graph",
                    where=path,
                    got=_last_line(said()) or str(error).splitlines()[0],
                ) from error

    def __call__(self, *inputs: NDArray[Any]) -> Float:
        """Runs it; the first output."""
        tensors = [self._torch.from_numpy(np.ascontiguousarray(each)) for each in inputs]
        try:
            found: Float = self._method(tensors)[0].numpy()
        except RuntimeError as error:
            raise BundleError(
                "executorch failed",
                where=self._name,
                got=str(error).splitlines()[0],
                hint="run `lorgnette verify` on the bundle",
            ) from error
        return found

    def attribute(self, name: str) -> NDArray[np.float32]:
        """The buffer of a name, not a copy of it."""
        with _quiet():
            try:
                found: NDArray[np.float32] = self._method.get_attribute(name).numpy()
            except RuntimeError as error:
                raise BundleError(f"there is no buffer '{name}'", where=self._path) from error
        return found

    def differs(self, got: str, wanted: str) -> BundleError:
        """The error of a graph that is not what the manifest says."""
        return BundleError(
            "graph is not what the manifest says", where=self._path, got=got, wanted=wanted
        )

    def _check(self, meta: Any, function: Any) -> None:
        """The method must take and give what the manifest promises."""
        found = [
            (meta.num_inputs(), meta.input_tensor_meta, function.inputs),
            (meta.num_outputs(), meta.output_tensor_meta, function.outputs),
        ]
        for count, describe, promised in found:
            if count != len(promised):
                raise self.differs(f"{count} tensors", f"{len(promised)} tensors")
            for index, entry in enumerate(promised):
                info = describe(index)
                sizes, scalar = list(info.sizes()), info.dtype()
                fits = len(sizes) == len(entry.shape) and all(
                    isinstance(axis, str) or axis == size
                    for axis, size in zip(entry.shape, sizes, strict=False)
                )
                if not fits or scalar != SCALARS[entry.dtype]:
                    wanted = f"{entry.name} {entry.dtype} {list(entry.shape)}"
                    raise self.differs(f"dtype {scalar} {sizes}", wanted)


def _runtime() -> Any:
    """The bindings of the runtime, with all operators that our files use.

    Raises:
        MissingExtraError: It is not installed.
    """
    spec = importlib.util.find_spec("executorch")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            "executorch is not installed", hint="pip install 'lorgnette[executorch]'"
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    with _LOADING, _quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the whole interface calls itself experimental
        import torch
        from executorch.extension.pybindings import portable_lib

        for library in LIBRARIES:
            for path in root.glob(f"{library}.*"):
                torch.ops.load_library(str(path))
    return portable_lib


@contextmanager
def _quiet() -> Iterator[Any]:
    """Keeps what the runtime's C++ writes to the terminal; gives a function that reads it."""
    with tempfile.TemporaryFile() as said:
        sys.stderr.flush()
        kept = os.dup(2)
        os.dup2(said.fileno(), 2)

        def read() -> str:
            said.seek(0)
            return said.read().decode(errors="replace")

        try:
            yield read
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("[")]
    return lines[-1] if lines else ""
