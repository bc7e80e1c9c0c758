"""Tiny models as `.pte` files, with the eager modules beside them and what runs the files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lorgnette.bundle import Bundle, list_files
from lorgnette.export.check import Parts
from lorgnette.export.families import open_checkpoint
from lorgnette.export.pipeline import read_parts
from lorgnette.manifest import Manifest
from lorgnette.quantize.plan import QuantPlan
from lorgnette.quantize.store import QuantizedModel
from lorgnette.recipe import Recipe
from lorgnette.runtime.engines.executorch import ExecutorchEngine
from lorgnette.targets import find_target
from lorgnette.targets.target import LoweredComponent
from tests.eager import CONTEXT, Eager
from tests.helpers import make_checkpoint, tiny_config
from tests.make_mobilevlm import TINY_CLIP, make_mobilevlm
from tests.make_mobilevlm import tiny_config as tiny_mobilevlm
from tests.make_omnivlm import make_omnivlm
from tests.make_omnivlm import tiny_config as tiny_omnivlm
from tests.quantized import quantized_model

Array = NDArray[np.float32]
LAYERS = 2
"""Of decoders: lowering takes seconds a layer."""


def smolvlm(folder: Path) -> Path:
    text, vision = {"num_hidden_layers": LAYERS}, {"num_hidden_layers": 1}
    return make_checkpoint(folder, tiny_config(text=text, vision=vision))


def mobilevlm(folder: Path) -> Path:
    """With the projector that has convolutions, means over tokens and norms."""
    config = tiny_mobilevlm("ldpnet", num_hidden_layers=LAYERS)
    return make_mobilevlm(folder, config, TINY_CLIP | {"num_hidden_layers": 2})


def omnivlm(folder: Path) -> Path:
    config = tiny_omnivlm()
    config["text_config"]["num_hidden_layers"] = LAYERS
    config["vision_config"]["num_hidden_layers"] = 1
    return make_omnivlm(folder, config)


CHECKPOINTS: dict[str, Callable[[Path], Path]] = {
    "smolvlm": smolvlm,
    "mobilevlm": mobilevlm,
    "omnivlm": omnivlm,
}


@dataclass
class Case:
    """A model lowered under a plan."""

    folder: Path
    parts: Parts
    quantized: QuantizedModel
    lowered: list[LoweredComponent]
    eager: Eager
    """With the weights that the plan makes."""

    @property
    def file(self) -> Path:
        return self.folder / self.lowered[0].graph

    def bundle(self, folder: Path | None = None, *, listed: Path | None = None) -> Bundle:
        """The part of a bundle that an engine asks for, from this folder or a copy of it.

        Args:
            folder: Where its files are.
            listed: The folder whose files the manifest lists, if it is another.
        """
        root = folder or self.folder
        entries = {
            component.name: SimpleNamespace(graph=report.graph, functions=report.functions)
            for component, report in zip(self.parts.components, self.lowered, strict=True)
        }
        manifest = SimpleNamespace(
            component=entries.__getitem__,
            spec=self.parts.spec,
            context_length=self.parts.context_length,
            files=list_files(listed or root),
        )
        found = SimpleNamespace(path=root, manifest=manifest, file=lambda name: root / name)
        return cast("Bundle", found)

    @property
    def manifest(self) -> Manifest:
        return self.bundle().manifest

    @cached_property
    def engine(self) -> ExecutorchEngine:
        return ExecutorchEngine(self.bundle(), threads=1)

    def report(self, component: str) -> LoweredComponent:
        names = [each.name for each in self.parts.components]
        return self.lowered[names.index(component)]


def lower_case(
    folder: Path, family: str, plan: QuantPlan, target: str = "executorch-xnnpack"
) -> Case:
    """Makes a checkpoint of a family and lowers it."""
    checkpoint = CHECKPOINTS[family](folder / "checkpoint")
    parts = read_parts(open_checkpoint(checkpoint, None), Recipe(context_length=CONTEXT))
    components = {component.name: component for component in parts.components}
    quantized = quantized_model(folder, components, parts.sources, plan)
    out = folder / "bundle"
    out.mkdir()
    lowered = cast("Any", find_target(target)).lower(parts, quantized, out, lambda step: None)
    return Case(out, parts, quantized, lowered, Eager(checkpoint, plan))


def off(got: Array, wanted: Array) -> float:
    """Norm of the difference over the norm of what was wanted."""
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype == np.float32
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def by_position(x: Tensor) -> Tensor:
    """Inputs as XNNPACK rounds them: 8 bits with a scale and a zero point for each position.

    Source: XNNPACK, src/xnnpack/quantization.h, `xnn_f32_qd8_asymmetric_quantization_params`.
    """
    low = x.amin(-1, keepdim=True).clamp(max=0)
    high = x.amax(-1, keepdim=True).clamp(min=0)
    scale = torch.where(high > low, (high - low) / 255, torch.ones_like(low))
    from_low, from_high = -128 + low / scale, 127 + high / scale
    zero = torch.where(from_low + from_high > 0, -128 - low / scale, 127 - high / scale)
    zero = zero.clamp(-128, 127).round()
    return ((x / scale + zero).round().clamp(-128, 127) - zero) * scale


class RoundedLinear(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(by_position(x))  # type: ignore[no-any-return]


def round_inputs(case: Case) -> Eager:
    """The eager model whose matrices of integers round their inputs as XNNPACK does."""
    eager = Eager(case.eager.folder, case.eager.plan)
    for component, module in eager.modules.items():
        kept = case.report(component).kept_in_float
        for name, layer in list(module.named_modules()):
            if isinstance(layer, nn.Linear) and f"{name}.weight" not in kept:
                owner, _, leaf = name.rpartition(".")
                setattr(module.get_submodule(owner), leaf, RoundedLinear(layer))
    return eager
