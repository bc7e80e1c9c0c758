"""ExecuTorch on the CPU: the methods of one `.pte`, its KV cache inside the loaded decoder."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lorgnette.bundle import Bundle, sha256_of
from lorgnette.errors import BundleError, MissingExtraError
from lorgnette.runtime.engines.engine import Float, Tiles, WholeEngine

if TYPE_CHECKING:
    from lorgnette.manifest import FunctionEntry, TensorEntry

COMPONENTS = ("vision_encoder", "token_embedding", "decoder")
LIBRARIES = (
    "extension/llm/custom_ops/libcustom_ops_aot_lib",
    "kernels/quantized/libquantized_ops_aot_lib",
)
"""Operators of the KV cache and of coded tables, which no module of the package loads by itself."""
SCALARS = {"uint8": 0, "int64": 4, "float32": 6}
"""Numbers of dtypes in executorch's scalar_type.h."""
KINDS = ("keys", "values")
_LOADING = threading.Lock()


class ExecutorchEngine(WholeEngine):
    """The three methods of a bundle's file."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        """Loads the methods; the number of threads is one for the whole process."""
        manifest = bundle.manifest
        runtime = _runtime()
        import torch

        with quiet():
            runtime._unsafe_reset_threadpool(threads)
        # Operators of the KV cache count on torch's threads: where those are more, calls of one
        # thread were seen to take two hundred times as long.
        torch.set_num_threads(threads)
        _check_digests(bundle)
        entries = [manifest.component(name) for name in COMPONENTS]
        given = [(runtime, bundle.file(entry.graph), entry.functions[0]) for entry in entries]
        self._vision, self._embedding = _Method(*given[0]), _Method(*given[1])
        decoder = _StatefulMethod(*given[2])
        self._decoder = _Decoder(decoder, manifest.spec.text.layers, manifest.context_length)

    def encode(self, tiles: Tiles, *, more: bool = False) -> Float:
        """Image tokens of a batch of tiles. Shapes: uint8 `[G, 3, edge, edge]` to `[G, N, D]`."""
        return np.concatenate([self._vision(tile[None]) for tile in tiles])

    def embed(self, token_ids: NDArray[np.int64]) -> Float:
        """Embeddings of tokens. Shapes: `[T]` to `[T, D]`."""
        found: Float = self._embedding(token_ids[None])[0]
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

    def __init__(self, method: _StatefulMethod, layers: int, capacity: int) -> None:
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


class _Meta(Protocol):
    """What the runtime tells of a method before it is loaded."""

    def num_inputs(self) -> int: ...
    def num_outputs(self) -> int: ...
    def input_tensor_meta(self, index: int) -> Any: ...  # noqa: ANN401
    def output_tensor_meta(self, index: int) -> Any: ...  # noqa: ANN401


class _Method:
    """A method that keeps nothing, loaded when it is first called."""

    def __init__(self, runtime: ModuleType, path: Path, function: FunctionEntry) -> None:
        import torch

        self._torch, self._path, self._function = torch, path, function
        self._running = threading.Lock()
        with quiet() as said:
            try:
                self._open(runtime)
            except (RuntimeError, MemoryError, IndexError, ValueError) as error:
                raise BundleError(
                    "executorch refuses the graph",
                    where=path,
                    got=_last_line(said()) or str(error).splitlines()[0],
                ) from error

    def _open(self, runtime: ModuleType) -> None:
        module = runtime._load_for_executorch(
            str(self._path), program_verification=runtime.Verification.InternalConsistency
        )
        name = self._function.name
        self._check(module.method_meta(name))
        self._run: Callable[[list[Any]], Any] = partial(module.run_method, name)

    def __call__(self, *inputs: NDArray[Any]) -> Float:
        """Runs it; the first output."""
        tensors = [self._torch.from_numpy(np.ascontiguousarray(each)) for each in inputs]
        try:
            with self._running:
                found: Float = self._run(tensors)[0].numpy()
        except RuntimeError as error:
            raise BundleError(
                "executorch failed",
                where=self._function.name,
                got=str(error).splitlines()[0],
                hint="run `lorgnette verify` on the bundle",
            ) from error
        return found

    def differs(self, got: str, wanted: str) -> BundleError:
        """The error of a graph that is not what the manifest says."""
        return BundleError(
            "graph is not what the manifest says", where=self._path, got=got, wanted=wanted
        )

    def _check(self, meta: _Meta) -> None:
        """The method must take and give what the manifest promises."""
        found = [
            (meta.num_inputs(), meta.input_tensor_meta, self._function.inputs),
            (meta.num_outputs(), meta.output_tensor_meta, self._function.outputs),
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


class _StatefulMethod(_Method):
    """A method with buffers that it keeps and that can be read and written.

    Its program is its own: methods of one program would share the memory that these lie in.
    """

    def _open(self, runtime: ModuleType) -> None:
        self._program = runtime._load_program(
            str(self._path), program_verification=runtime.Verification.InternalConsistency
        )
        self._check(self._program.method_meta(self._function.name))
        self._method = self._run = self._program.load_method(self._function.name)

    @property
    def states(self) -> Sequence[TensorEntry]:
        """The buffers that the manifest promises."""
        return self._function.states

    def attribute(self, name: str) -> NDArray[np.float32]:
        """The buffer of a name, not a copy of it."""
        with quiet():
            try:
                found: NDArray[np.float32] = self._method.get_attribute(name).numpy()
            except RuntimeError as error:
                raise BundleError(f"there is no buffer '{name}'", where=self._path) from error
        return found


def _check_digests(bundle: Bundle) -> None:
    """Refuses a file that was damaged before the runtime sees it: a wrong byte can crash it.

    Raises:
        BundleError: Its digest is not what the manifest says.
    """
    digests = {entry.path: entry.sha256 for entry in bundle.manifest.files}
    for name in {bundle.manifest.component(component).graph for component in COMPONENTS}:
        if sha256_of(bundle.file(name)) != digests[name]:
            raise BundleError(
                f"file '{name}' was changed or damaged",
                where=bundle.path,
                hint="copy or export the bundle again",
            )


def _runtime() -> ModuleType:
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
    with _LOADING, quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the whole interface calls itself experimental
        import torch

        bindings = importlib.import_module("executorch.extension.pybindings.portable_lib")
        for library in LIBRARIES:
            for path in root.glob(f"{library}.*"):
                torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    return bindings


@contextmanager
def quiet() -> Iterator[Any]:
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
