"""Components lowered for Core AI, beside the same in eager torch."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from coreai.authoring import AIModelAsset
from coreai.runtime import NDArray as CoreArray
from numpy.typing import NDArray

from lorgnette.bundle import Bundle, list_files
from lorgnette.export.check import Parts
from lorgnette.export.component import Component
from lorgnette.export.trace import build_module
from lorgnette.export.weights import WeightSource, module_shapes
from lorgnette.manifest import FunctionEntry, Manifest
from lorgnette.quantize.plan import PLANS
from lorgnette.quantize.store import QuantizedModel, QuantizedSource
from lorgnette.runtime.engines.coreai import CoreAiEngine
from lorgnette.targets.coreai.constants import Constants
from lorgnette.targets.coreai.convert import Function, write_asset
from lorgnette.targets.coreai.lowering import CoreAi
from lorgnette.targets.target import LoweredComponent
from tests.eager import CONTEXT, Eager
from tests.family_cases import CASES
from tests.helpers import make_checkpoint, tiny_config
from tests.quantized import quantized_model


@dataclass(frozen=True)
class Made:
    """A tiny model as assets.

    Attributes:
        folder: Holds `graphs/`.
        eager: The same in torch, with the same rounded weights.
        quantized: The codes that the assets were made of.
        reports: What lowering said, by component.
    """

    folder: Path
    eager: Eager
    quantized: QuantizedModel
    reports: Mapping[str, LoweredComponent]

    @cached_property
    def engine(self) -> CoreAiEngine:
        """What runs the assets."""
        return CoreAiEngine(self.bundle(), threads=1)

    def bundle(self, functions: Mapping[str, FunctionEntry] | None = None) -> Bundle:
        """The bundle as far as an engine looks at it.

        Args:
            functions: Other descriptions of functions, by name, than the true ones.
        """
        other = functions or {}
        components = [
            SimpleNamespace(
                name=name,
                graph=report.graph,
                functions=tuple(other.get(each.name, each) for each in report.functions),
            )
            for name, report in self.reports.items()
        ]
        manifest = SimpleNamespace(
            components=components, files=list_files(self.folder), context_length=CONTEXT
        )
        return Bundle(self.folder, cast("Manifest", manifest))

    def at(self, folder: Path) -> Made:
        """The same assets elsewhere."""
        return replace(self, folder=folder)

    def asset_bytes(self, name: str) -> int:
        """Size of the program of an asset."""
        return (self.folder / "graphs" / f"{name}.aimodel" / "main.mlirb").stat().st_size


def make(folder: Path, case: str, plan: str) -> Made:
    """Lowers the tiny model of a family, or tiny SmolVLM, under a named plan."""
    checkpoint = folder / "checkpoint"
    if case == "smolvlm":
        make_checkpoint(checkpoint, tiny_config())
    else:
        checkpoint = CASES[case].make(checkpoint)
    eager = Eager(checkpoint, PLANS[plan])
    sources = {
        name: WeightSource(
            eager.checkpoint, module_shapes(build_module(component)), component.rules
        )
        for name, component in eager.components.items()
    }
    quantized = quantized_model(folder, eager.components, sources, PLANS[plan])
    bundle = folder / "bundle"
    bundle.mkdir()
    parts = SimpleNamespace(components=tuple(eager.components.values()), context_length=CONTEXT)
    lowered = CoreAi().lower(cast("Parts", parts), quantized, bundle, lambda _: None)
    reports = dict(zip(eager.components, lowered, strict=True))
    return Made(bundle, eager, quantized, reports)


def relative(got: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Norm of the difference over the norm of what was wanted."""
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def run_alone(
    path: Path, component: Component, source: QuantizedSource, x: NDArray[np.generic]
) -> NDArray[np.float32]:
    """Lowers a component of one input and one output, and runs it once."""
    constants = Constants({component.name: source})
    sources = {component.name: source}
    write_asset(path, [Function("run", component, {})], sources, constants, lambda _: None)
    narrow = x.astype(np.int32) if x.dtype == np.int64 else x

    async def run() -> NDArray[np.float32]:
        async with AIModelAsset.load(path).executable() as model:
            function = model.load_function("run")
            outputs: dict[str, Any] = await function({"x": CoreArray(narrow)})
            found: NDArray[np.float32] = outputs["y"].numpy().copy()
            return found

    return asyncio.run(run())
