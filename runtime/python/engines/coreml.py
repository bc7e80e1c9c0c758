"""Core ML packages, emulated with torch: no Mac is needed, and none is replaced.

Apple's Core ML runs on Apple's systems alone. Elsewhere the packages of a bundle are read back from
disk and run operator by operator as the program says, float16 rounding included; see
`lorgnette.targets.coreml.evaluate` for what that shows and what it cannot. The engine is slow and
knows one thing that a device does not: under the name `coreml-float32` nothing is rounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lorgnette.bundle import Bundle
from lorgnette.errors import BundleError, MissingExtraError
from lorgnette.runtime.engines.engine import Float, Tiles, WholeEngine

if TYPE_CHECKING:
    from lorgnette.targets.coreml.evaluate import Evaluator

EMULATED, EXACT = "coreml", "coreml-float32"

MOST_THREADS = 2
"""A decoder's many small operators wait for the slowest thread. Measured on SmolVLM-256M: a second
thread nearly halves the time of a tile, but four on four busy cores are forty times slower."""

Shapes = dict[str, tuple[str, tuple[int, ...]]]


class CoreMlEngine(WholeEngine):
    """The three packages of a bundle."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        """Reads the packages.

        Raises:
            BundleError: One is damaged, or not what the manifest says.
            MissingExtraError: torch or coremltools are not installed.
        """
        try:
            import torch
        except ImportError as error:
            raise MissingExtraError(
                "running a Core ML bundle here needs torch",
                hint="pip install 'lorgnette[export,coreml]'",
            ) from error
        torch.set_num_threads(min(threads, MOST_THREADS))
        self._vision = _open(bundle, "vision_encoder")
        self._embedding = _open(bundle, "token_embedding")
        self._decoder = _open(bundle, "decoder")
        manifest = bundle.manifest
        self._context_length = manifest.context_length
        _check_interface(bundle, self._vision, self._embedding, self._decoder)

    def encode(self, tiles: Tiles, *, more: bool = False) -> Float:
        """Image tokens of a batch of tiles, one after the other.

        Shapes: uint8 `[G, 3, edge, edge]` to `[G, N, D]`.
        """
        made = [
            self._vision.run("main", {"tiles": tile[None].astype(np.int32)})["image_tokens"]
            for tile in tiles
        ]
        return np.concatenate(made).astype(np.float32, copy=False)

    def embed(self, token_ids: NDArray[np.int64]) -> Float:
        """Embeddings of tokens. Shapes: `[T]` to `[T, D]`."""
        if len(token_ids) == 1:
            return self._look_up("embed_one", token_ids)
        ((_, rows),) = (t.shape for t in self._embedding.package.functions["embed"].inputs.values())
        parts = []
        for start in range(0, len(token_ids), rows):
            part = token_ids[start : start + rows]
            filled = np.zeros(rows, np.int64)
            filled[: len(part)] = part
            parts.append(self._look_up("embed", filled)[: len(part)])
        return np.concatenate(parts)

    def _look_up(self, function: str, token_ids: NDArray[np.int64]) -> Float:
        found = self._embedding.run(function, {"token_ids": token_ids[None].astype(np.int32)})
        embeddings: Float = found["embeddings"][0].astype(np.float32, copy=False)
        return embeddings

    def new_state(self) -> CoreMlDecoderState:
        """An empty KV cache of the bundle's context length."""
        return CoreMlDecoderState(self._decoder, self._context_length)


class CoreMlDecoderState:
    """A KV cache: Core ML's states where the decoder has them, else arrays passed in and out."""

    def __init__(self, decoder: Evaluator, capacity: int) -> None:
        """Zeros."""
        self.capacity = capacity
        self._decoder = decoder
        code = decoder.package.functions["prefill"]
        self._rows = code.inputs["embeddings"].shape[1]
        self._states = decoder.new_state("prefill")
        self._passed = {
            name: np.zeros(type_.shape, np.float32)
            for name, type_ in code.inputs.items()
            if name.endswith("_in")
        }

    def run(self, embeddings: Float, past_length: int) -> Float:
        """Appends T positions after `past_length` and gives the logits behind the last.

        Positions go through `prefill` in calls of a fixed size, the last filled up, or, one alone,
        through `decode`.

        Shapes: `embeddings` `[T, D]`; returns `[V]`.
        """
        if past_length + len(embeddings) > self.capacity:
            raise ValueError(f"{past_length} + {len(embeddings)} positions in {self.capacity}")
        if len(embeddings) == 1:
            return self._call("decode", embeddings, past_length, {})
        for start in range(0, len(embeddings), self._rows):
            part = embeddings[start : start + self._rows]
            filled = np.zeros((self._rows, part.shape[1]), np.float32)
            filled[: len(part)] = part
            last: dict[str, NDArray[np.generic]] = {"last_row": np.array([len(part) - 1], np.int32)}
            logits = self._call("prefill", filled, past_length + start, last)
        return logits

    def _call(
        self, function: str, embeddings: Float, past: int, more: dict[str, NDArray[np.generic]]
    ) -> Float:
        inputs: dict[str, NDArray[np.generic]] = {
            "embeddings": embeddings[None],
            "past_length": np.array([past], np.int32),
        }
        found = self._decoder.run(function, {**inputs, **more, **self._passed}, self._states)
        logits: Float = found.pop("logits")[0].astype(np.float32, copy=False)
        self._passed = {
            name: found[name.removesuffix("_in") + "_out"].astype(np.float32, copy=False)
            for name in self._passed
        }
        return logits


def _open(bundle: Bundle, component: str) -> Evaluator:
    from lorgnette.targets.coreml.evaluate import Evaluator
    from lorgnette.targets.coreml.package import read_package

    folder = bundle.folder(bundle.manifest.component(component).graph)
    return Evaluator(read_package(folder), exact=bundle.manifest.engine == EXACT)


def _check_interface(
    bundle: Bundle, vision: Evaluator, embedding: Evaluator, decoder: Evaluator
) -> None:
    """Functions must take and give what the model's numbers say.

    Raises:
        BundleError: One does not.
    """
    spec = bundle.manifest.spec
    text, edge, width = spec.text, spec.vision.image_size, spec.text.hidden_size
    _check(
        vision,
        {"main": {"tiles": ("int32", (1, 3, edge, edge))}},
        {"image_tokens": (1, spec.image_tokens_per_tile, width)},
    )
    chunk = _size(embedding, "embed", "token_ids", 1)
    for name, rows in (("embed", chunk), ("embed_one", 1)):
        takes: dict[str, Shapes] = {name: {"token_ids": ("int32", (1, rows))}}
        _check(embedding, takes, {"embeddings": (1, rows, width)})
    chunk = _size(decoder, "prefill", "embeddings", 1)
    capacity = _capacity(decoder)
    if capacity < bundle.manifest.context_length + chunk - 1:
        raise BundleError(
            "the KV cache is too small for the context",
            where=decoder.package.path,
            got=capacity,
            wanted=f">= {bundle.manifest.context_length + chunk - 1}",
        )
    cache = (1, text.kv_heads, capacity, text.head_size)
    for name, rows in (("prefill", chunk), ("decode", 1)):
        inputs: Shapes = {
            "embeddings": ("float", (1, rows, width)),
            "past_length": ("int32", (1,)),
        }
        if name == "prefill":
            inputs["last_row"] = ("int32", (1,))
        _check(decoder, {name: inputs}, {"logits": (1, text.vocab_size)}, (text.layers, cache))


def _capacity(decoder: Evaluator) -> int:
    code = decoder.package.functions["prefill"]
    shapes = {type_.shape for type_ in code.states.values()}
    shapes |= {type_.shape for name, type_ in code.inputs.items() if name.endswith("_in")}
    if len(shapes) != 1 or len(next(iter(shapes))) != 4:
        raise BundleError("KV caches are not alike", where=decoder.package.path, got=shapes)
    return next(iter(shapes))[2]


def _size(evaluator: Evaluator, function: str, name: str, axis: int) -> int:
    """A size that the package chooses.

    Raises:
        BundleError: There is no such function or input.
    """
    code = evaluator.package.functions.get(function)
    type_ = None if code is None else code.inputs.get(name)
    if type_ is None or len(type_.shape) <= axis:
        raise BundleError(
            f"function '{function}' or its input '{name}' is missing", where=evaluator.package.path
        )
    return type_.shape[axis]


def _check(
    evaluator: Evaluator,
    functions: dict[str, Shapes],
    outputs: dict[str, tuple[int, ...]],
    caches: tuple[int, tuple[int, ...]] = (0, ()),
) -> None:
    layers, cache = caches
    names = [f"{kind}_{layer}" for layer in range(layers) for kind in ("key", "value")]
    for function, inputs in functions.items():
        code = evaluator.package.functions.get(function)
        if code is None:
            raise BundleError(f"function '{function}' is missing", where=evaluator.package.path)
        passed = not code.states
        held = {f"{name}_in" if passed else name: cache for name in names}
        got = {
            name: ("float" if t.dtype.startswith("float") else t.dtype, t.shape)
            for name, t in code.inputs.items()
        }
        wanted = inputs | (
            {name: ("float", shape) for name, shape in held.items()} if passed else {}
        )
        given = {name: type_.shape for name, type_ in code.outputs.items()}
        promised = outputs | ({f"{name}_out": cache for name in names} if passed else {})
        states = {name: type_.shape for name, type_ in code.states.items()}
        pairs = ((got, wanted), (given, promised), (states, {} if passed else held))
        for found, asked in pairs:
            if found != asked:
                raise BundleError(
                    "graph is not what the manifest says",
                    where=f"{evaluator.package.path}, function '{function}'",
                    got=_differing(found, asked),
                    wanted=_differing(asked, found),
                )


def _differing(one: object, other: object) -> str:
    """What of one the other has not."""
    mine = dict(one) if isinstance(one, dict) else {}
    theirs = dict(other) if isinstance(other, dict) else {}
    found = {name: value for name, value in mine.items() if theirs.get(name) != value}
    return str(next(iter(found.items()), "nothing more"))
