"""Models and single modules as Core ML packages, and what must come out of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorgnette.export.component import Component
from lorgnette.export.trace import build_module
from lorgnette.export.weights import WeightSource, module_shapes
from lorgnette.quantize.methods import load_method
from lorgnette.quantize.plan import QuantPlan
from lorgnette.quantize.scales import half_scales
from lorgnette.quantize.store import QuantizedModel
from lorgnette.targets.coreml.build import Built, build_package
from lorgnette.targets.coreml.evaluate import Evaluator, State
from lorgnette.targets.coreml.lowering import computes_in_half
from lorgnette.targets.coreml.package import read_package
from tests.eager import Eager, StoredSource
from tests.quantized import quantized_model, quantized_source
from tests.small import tensor_folder

Array = NDArray[np.float32]
Arrays = dict[str, NDArray[np.generic]]


class HalfSource(StoredSource):
    """Weights as packages that compute in float16 hold them, seen without further rounding.

    What is no matrix is float16, and so are scales.
    """

    def tensor(self, name: str) -> Tensor:
        """The parameter as stored."""
        value = WeightSource.tensor(self, name)
        if value.dim() != 2 or not name.endswith(".weight"):
            return value.half().float()
        rule = self.plan.rule_for(self.component, name)
        if not rule.scheme.is_integer:
            return value.half().float()
        made = load_method(rule.method).quantize(value.numpy(), rule.scheme)
        made.scales[:] = half_scales(made.scales)
        if made.tables is not None:
            made.tables[:] = made.tables.astype(np.float16)
        return torch.from_numpy(made.dequantize())


@dataclass
class StoredEager(Eager):
    """The components of a checkpoint with the numbers that a package holds."""

    @cached_property
    def sources(self) -> dict[str, StoredSource]:
        """The weights of each component."""
        if not computes_in_half(self.plan):
            return super().sources
        made: dict[str, StoredSource] = {}
        for name, component in self.components.items():
            shapes = module_shapes(build_module(component))
            made[name] = HalfSource(self.checkpoint, shapes, component.rules)
            made[name].component, made[name].plan = name, self.plan
        return made


@dataclass
class Decoding:
    """A decoder's package with one KV cache, run in calls of any number of positions."""

    evaluator: Evaluator
    state: State = field(init=False)
    passed: Arrays = field(init=False)

    def __post_init__(self) -> None:
        code = self.evaluator.package.functions["prefill"]
        self.state = self.evaluator.new_state("prefill")
        names = (name for name in code.inputs if name.endswith("_in"))
        self.passed = {name: np.zeros(code.inputs[name].shape, np.float32) for name in names}

    def run(self, embeddings: Array, past: int) -> Array:
        """Logits behind T positions after `past`: `[T, D]` to `[V]`."""
        count = len(embeddings)
        rows = self.evaluator.package.functions["prefill"].inputs["embeddings"].shape[1]
        if count == 1:
            return self._call("decode", embeddings, past, {})
        assert count <= rows
        filled = np.concatenate([embeddings, np.full((rows - count, embeddings.shape[1]), 7.0)])
        return self._call("prefill", filled, past, {"last_row": np.array([count - 1])})

    def _call(self, function: str, embeddings: Array, past: int, more: Arrays) -> Array:
        inputs: Arrays = {"embeddings": embeddings[None], "past_length": np.array([past])}
        found = self.evaluator.run(function, inputs | more | self.passed, self.state)
        logits = found.pop("logits")[0]
        self.passed = {name.replace("_out", "_in"): array for name, array in found.items()}
        return np.asarray(logits, np.float32)

    def logits(self, embeddings: Array, chunks: Sequence[int]) -> Array:
        """Logits after each of several calls, `[len(chunks), V]`."""
        past, found = 0, []
        for size in chunks:
            found.append(self.run(embeddings[past : past + size], past))
            past += size
        return np.stack(found)


@dataclass
class Packages:
    """The three packages of a model, exact and rounding evaluators of them."""

    folder: Path
    built: Mapping[str, Built]
    quantized: QuantizedModel

    def path(self, name: str) -> Path:
        """Where a package lies."""
        return self.folder / f"{name}.mlpackage"

    @cached_property
    def exact(self) -> dict[str, Evaluator]:
        """Evaluators that round nothing."""
        return {name: Evaluator(read_package(self.path(name)), exact=True) for name in self.built}

    @cached_property
    def rounding(self) -> dict[str, Evaluator]:
        """Evaluators that round as the programs say."""
        return {name: Evaluator(read_package(self.path(name))) for name in self.built}


def lower_all(folder: Path, plain: Eager, plan: QuantPlan) -> Packages:
    """Lowers a checkpoint."""
    folder.mkdir(parents=True)
    model = quantized_model(folder, plain.components, plain.sources, plan)
    built = {
        name: build_package(
            component,
            model.sources[name],
            folder / f"{name}.mlpackage",
            context_length=plain.context,
            half=computes_in_half(plan),
        )
        for name, component in plain.components.items()
    }
    return Packages(folder, built, model)


def lower_one(
    folder: Path, component: Component, weights: Mapping[str, Tensor], plan: QuantPlan
) -> tuple[Path, Built]:
    """Lowers one component with weights of its own names."""
    checkpoint = tensor_folder(folder / "checkpoint", weights)
    source = WeightSource(checkpoint, module_shapes(build_module(component)), component.rules)
    path = folder / "one.mlpackage"
    built = build_package(
        component,
        quantized_source(folder, component, source, plan),
        path,
        context_length=64,
        half=computes_in_half(plan),
    )
    return path, built


def encode(evaluator: Evaluator, tiles: NDArray[np.uint8]) -> Array:
    """Image tokens of some tiles."""
    made = [
        evaluator.run("main", {"tiles": tile[None].astype(np.int32)})["image_tokens"]
        for tile in tiles
    ]
    return np.concatenate(made).astype(np.float32)


def embed(evaluator: Evaluator, ids: Sequence[int]) -> Array:
    """Embeddings of at most a call's tokens, `[T, D]`."""
    rows = evaluator.package.functions["embed"].inputs["token_ids"].shape[1]
    filled = np.array([*ids, *[0] * (rows - len(ids))], np.int32)[None]
    return evaluator.run("embed", {"token_ids": filled})["embeddings"][0, : len(ids)].astype(
        np.float32
    )
