"""The targets of ExecuTorch: `executorch-xnnpack`, and others that can be lowered but not run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorgnette.errors import ConfigError
from lorgnette.manifest import FunctionEntry, Manifest, TensorEntry
from lorgnette.quantize.plan import QuantPlan
from lorgnette.quantize.scheme import GROUP_SIZES
from lorgnette.targets.capabilities import (
    Capabilities,
    Matrix,
    SchemeRange,
    lacking,
    scheme_problems,
    some,
)
from lorgnette.targets.executorch.schemes import GROUPS, why_float
from lorgnette.targets.target import LoweredComponent, Target

if TYPE_CHECKING:
    from lorgnette.export.check import Parts
    from lorgnette.export.component import Component
    from lorgnette.quantize.store import QuantizedModel

GRAPHS = "graphs"
MODEL = f"{GRAPHS}/model.pte"
MATRICES_FILE = f"{GRAPHS}/matrices.json"
"""Where in the delegates each matrix of integers lies, for whoever reads them back."""

FLOATS = SchemeRange(bits=(16, 32))
MATRICES = (
    FLOATS,
    SchemeRange(bits=(4,), groups=GROUPS, activations=("int8_token",), scale_bits=(16,)),
    SchemeRange(bits=(8,), activations=("int8_token",)),
)
# See why_float.
AS_FLOATS = (
    SchemeRange(
        bits=(8,), groups=GROUP_SIZES, activations=("float", "int8_token"), scale_bits=(32, 16)
    ),
)
TABLES = (FLOATS, SchemeRange(bits=(4, 8), groups=GROUP_SIZES, scale_bits=(32, 16)))


class ExecutorchXnnpack:
    """One `.pte` with the methods of the stock multimodal runner, multiplied by XNNPACK."""

    name = "executorch-xnnpack"
    capabilities = Capabilities(
        matrices=MATRICES,
        tables=TABLES,
        as_floats=AS_FLOATS,
        cache_style="state",
        cache_bits=(32,),
        tile_counts=(1,),
        engine="executorch",
        engine_min_version="1.5.1",
        engine_package="executorch",
        packages=("executorch", "torchao"),
        extra="executorch",
        activations={"int8_group": "int8_token", "int8_static": "int8_token"},
        arithmetic="float32",
        os_floor="Android 8, iOS 17, any Linux or macOS",
        summary="ExecuTorch with XNNPACK on any CPU, in the stock Android and iOS modules",
    )

    def missing(self) -> str:
        """What lowering needs and this machine lacks; empty where nothing is."""
        return lacking("executorch", "executorch", "torchao")

    def check(self, matrices: Sequence[Matrix], plan: QuantPlan) -> Sequence[str]:
        """Every reason why a model of these matrices cannot be lowered so; empty where it can."""
        problems = scheme_problems(self.capabilities, plan, matrices)
        for table in (matrix for matrix in matrices if matrix.gathered):
            scheme = plan.scheme_for(table.component, table.name)
            if scheme.is_integer and scheme.group_size and table.columns % scheme.group_size:
                problems.append(
                    f"the width {table.columns} of {some([table])} is not a multiple of "
                    f"{scheme.group_size}, so it cannot be gathered as {scheme.form}"
                )
        return [*problems, *_all_in_float(matrices, plan)]

    def lower(
        self,
        parts: Parts,
        quantized: QuantizedModel,
        folder: Path,
        progress: Callable[[str], None],
    ) -> list[LoweredComponent]:
        """Writes one file of three methods, and where each matrix lies in it."""
        from lorgnette.targets.executorch.model import lower_model

        (folder / GRAPHS).mkdir()
        return lower_model(parts, quantized, folder, progress)

    def exact_twin(self, folder: Path, manifest: Manifest) -> Manifest | None:
        """There is none: XNNPACK multiplies integer weights by rounded activations only."""
        del folder, manifest
        return None


def functions(component: Component, context_length: int) -> tuple[FunctionEntry, ...]:
    """What the methods of a component take and give."""
    from lorgnette.targets.executorch.program import METHODS

    name = METHODS[component.name]
    outputs = tuple(_fixed(_entry(spec)) for spec in component.outputs)
    inputs = [_fixed(_entry(component.inputs[0]))]
    states: list[TensorEntry] = []
    if component.name == "decoder":
        inputs.append(TensorEntry(name="positions", dtype="int64", shape=(1,)))
        for spec in component.cache_inputs:
            _, heads, _, size = spec.shape
            shape = (1, context_length, heads, size)
            states.append(
                TensorEntry(name=spec.name.removesuffix("_in"), dtype="float32", shape=shape)
            )
    return tuple(
        FunctionEntry(
            name=name,
            entry_point=entry_point,
            inputs=tuple(inputs),
            outputs=outputs,
            states=tuple(states),
        )
        for entry_point in component.entry_points
    )


def _entry(spec: object) -> TensorEntry:
    name, dtype, shape = spec.name, str(spec.dtype).removeprefix("torch."), spec.shape  # type: ignore[attr-defined]
    return TensorEntry(name=name, dtype=dtype, shape=shape)  # type: ignore[arg-type]


def _fixed(entry: TensorEntry) -> TensorEntry:
    """One tile a call."""
    shape = tuple(1 if axis == "G" else axis for axis in entry.shape)
    return TensorEntry(name=entry.name, dtype=entry.dtype, shape=shape)


def _all_in_float(matrices: Sequence[Matrix], plan: QuantPlan) -> list[str]:
    """Refuses a plan under which no matrix of the decoder would be what it asks for."""
    integers, floats = 0, []
    for matrix in matrices:
        scheme = plan.scheme_for(matrix.component, matrix.name)
        if matrix.component == "decoder" and not matrix.gathered and scheme.is_integer:
            integers += 1
            if why_float(scheme, matrix.columns):
                floats.append((matrix, scheme))
    if not floats or len(floats) < integers:
        return []
    matrix, scheme = floats[0]
    reason = why_float(scheme, matrix.columns)
    return [
        f"{some([m for m, _ in floats])} would be stored as floats, since {reason}; nearest: "
        "int8c/int8_token (the plan int8-channel), int4g32h/int8_token (the plan int4)"
    ]


class ExecutorchCoreml(ExecutorchXnnpack):
    """The vision encoder for Core ML, the rest for XNNPACK; lowered here and run nowhere here."""

    name = "executorch-coreml"
    capabilities = Capabilities(
        matrices=(FLOATS,),
        tables=(FLOATS,),
        cache_style="state",
        cache_bits=(32,),
        tile_counts=(1,),
        engine="executorch",
        engine_min_version="1.5.1",
        engine_package="executorch",
        packages=("executorch", "torchao"),
        extra="executorch",
        arithmetic="float16",
        os_floor="iOS 18, macOS 15",
        summary="ExecuTorch with Core ML for the vision encoder and XNNPACK for the rest",
        not_run="ExecuTorch's Core ML delegate is in its runtime for Apple systems only",
    )

    def missing(self) -> str:
        """What lowering needs and this machine lacks; empty where nothing is."""
        return super().missing() or lacking("coreml", "coremltools")

    def lower(
        self,
        parts: Parts,
        quantized: QuantizedModel,
        folder: Path,
        progress: Callable[[str], None],
    ) -> list[LoweredComponent]:
        """Writes one file of three methods, and where each matrix lies in it."""
        from lorgnette.targets.executorch.lower_only import coreml_delegates
        from lorgnette.targets.executorch.model import lower_model

        (folder / GRAPHS).mkdir()
        delegates = coreml_delegates(float32=quantized.plan.name == "fp32")
        return lower_model(parts, quantized, folder, progress, delegates)


class ExecutorchVulkan(ExecutorchXnnpack):
    """Every component for a GPU with Vulkan; lowered here and run nowhere here."""

    name = "executorch-vulkan"
    capabilities = Capabilities(
        matrices=(FLOATS,),
        tables=(FLOATS,),
        cache_style="state",
        cache_bits=(32,),
        tile_counts=(1,),
        engine="executorch",
        engine_min_version="1.5.1",
        engine_package="executorch",
        packages=("executorch", "torchao"),
        extra="executorch",
        os_floor="Android 10 with Vulkan 1.1",
        summary="ExecuTorch with Vulkan on the GPU of an Android device",
        not_run="ExecuTorch's Vulkan delegate is in its runtime for Android only",
    )

    def lower(
        self,
        parts: Parts,
        quantized: QuantizedModel,
        folder: Path,
        progress: Callable[[str], None],
    ) -> list[LoweredComponent]:
        """Writes one file of three methods, and where each matrix lies in it."""
        from lorgnette.targets.executorch.lower_only import vulkan_delegates
        from lorgnette.targets.executorch.model import lower_model

        (folder / GRAPHS).mkdir()
        return lower_model(parts, quantized, folder, progress, vulkan_delegates())


class ExecutorchQnn(ExecutorchXnnpack):
    """Qualcomm's NPU, which cannot be lowered to with what packages hold."""

    name = "executorch-qnn"
    capabilities = Capabilities(
        matrices=(FLOATS,),
        tables=(FLOATS,),
        cache_style="state",
        cache_bits=(32,),
        tile_counts=(1,),
        engine="executorch",
        engine_min_version="1.5.1",
        engine_package="executorch",
        packages=("executorch", "torchao"),
        extra="executorch",
        os_floor="Android 10 with Snapdragon 8 Gen 1 or newer",
        summary="ExecuTorch with Qualcomm's NPU: not offered, see why",
        not_run="nothing is lowered",
    )

    def missing(self) -> str:
        """What lowering needs and no package holds."""
        return (
            "ExecuTorch lowers to Qualcomm's NPU with libraries of Qualcomm's SDK only, which no "
            "package holds (use executorch-xnnpack, or executorch-vulkan for the GPU)"
        )

    def lower(
        self,
        parts: Parts,
        quantized: QuantizedModel,
        folder: Path,
        progress: Callable[[str], None],
    ) -> list[LoweredComponent]:
        """Refuses.

        Raises:
            ConfigError: Always, with the reason.
        """
        raise ConfigError(f"cannot lower to {self.name}", got=self.missing())


TARGETS: tuple[Target, ...] = (
    ExecutorchXnnpack(),
    ExecutorchCoreml(),
    ExecutorchVulkan(),
    ExecutorchQnn(),
)
