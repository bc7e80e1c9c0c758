"""The target `coreml`: packages for iOS 18, macOS 15 and later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorgnette.manifest import FunctionEntry, TensorEntry
from lorgnette.quantize.plan import QuantPlan
from lorgnette.quantize.scheme import GROUP_SIZES, ScaleBits
from lorgnette.targets.capabilities import (
    Capabilities,
    Matrix,
    SchemeRange,
    lacking,
    scheme_problems,
)
from lorgnette.targets.target import LoweredComponent, Target

if TYPE_CHECKING:
    from lorgnette.export.check import Parts
    from lorgnette.manifest import Manifest
    from lorgnette.quantize.store import QuantizedModel
    from lorgnette.targets.coreml.build import Built, Made, Tensor

FLOATS = SchemeRange(bits=(16, 32))
EITHER = (True, False)
SCALE_BITS: tuple[ScaleBits, ...] = (32, 16, 8)
# What constexpr_blockwise_shift_scale and constexpr_lut_to_dense of iOS 18 hold, in int4, uint4,
# int8, uint8, and indices of 4, 6 and 8 bits. Core ML rounds no activations that it is not given
# ranges of, so schemes that round them are carried without.
MATRICES = (
    FLOATS,
    SchemeRange(bits=(4, 8), groups=GROUP_SIZES, symmetric=EITHER, scale_bits=SCALE_BITS),
    SchemeRange(bits=(4, 8), symmetric=EITHER, per_tensor=EITHER, scale_bits=SCALE_BITS),
    SchemeRange(bits=(4, 6, 8), palette=True),
)
TABLES = (
    FLOATS,
    SchemeRange(bits=(4, 8), groups=(0, *GROUP_SIZES), symmetric=EITHER, scale_bits=SCALE_BITS),
)
GRAPHS = "graphs"


class CoreMl:
    """Core ML packages: fixed shapes, a stateful decoder, prefill and decode sharing weights."""

    name = "coreml"
    capabilities = Capabilities(
        matrices=MATRICES,
        tables=TABLES,
        cache_style="state",
        cache_bits=(32,),
        engine="coreml",
        engine_min_version="9.0",
        engine_package="coremltools",
        packages=("coremltools",),
        extra="coreml",
        os_floor="iOS 18, macOS 15",
        arithmetic="float16",
        tile_counts=(1,),
        activations={"int8_group": "float", "int8_token": "float", "int8_static": "float"},
        summary="Core ML on iPhone, iPad and Mac; off a Mac its packages are run by an emulation",
    )

    def missing(self) -> str:
        """What lowering needs and this machine lacks, with what to do; empty where nothing is."""
        return lacking("coreml", "coremltools")

    def check(self, matrices: Sequence[Matrix], plan: QuantPlan) -> Sequence[str]:
        """Every reason why a model of these matrices cannot be lowered so; empty where it can."""
        return scheme_problems(self.capabilities, plan, matrices)

    def lower(
        self,
        parts: Parts,
        quantized: QuantizedModel,
        folder: Path,
        progress: Callable[[str], None],
    ) -> list[LoweredComponent]:
        """Writes a package a component, and refuses one that its own evaluator could not run.

        Raises:
            ConfigError: An operator has no translation, or the evaluator lacks it.
        """
        from lorgnette.targets.coreml.build import build_package

        (folder / GRAPHS).mkdir(exist_ok=True)
        lowered = []
        for component in parts.components:
            progress(f"lower {component.name}")
            graph = f"{GRAPHS}/{component.name}.mlpackage"
            built = build_package(
                component,
                quantized.sources[component.name],
                folder / graph,
                context_length=parts.context_length,
                half=computes_in_half(quantized.plan),
            )
            lowered.append(_lowered(graph, built, folder / graph))
        return lowered

    def exact_twin(self, folder: Path, manifest: Manifest) -> Manifest | None:
        """The same packages for the engine that rounds nothing.

        Weights stay as they are stored, those that are no matrix in float16; their rounding alone
        leaves about a thousandth.
        """
        import msgspec

        from lorgnette.runtime.engines.coreml import EMULATED, EXACT

        if manifest.engine != EMULATED:
            return None
        return msgspec.structs.replace(manifest, engine=EXACT)


def computes_in_half(plan: QuantPlan) -> bool:
    """Whether functions compute in float16: under every plan but one of float32 throughout."""
    return any(rule.scheme.bits != 32 for rule in plan.rules)


def _lowered(graph: str, built: Built, path: Path) -> LoweredComponent:
    from lorgnette.errors import ConfigError
    from lorgnette.targets.coreml.evaluate import unknown_operators
    from lorgnette.targets.coreml.lint import lint
    from lorgnette.targets.coreml.package import read_package

    package = read_package(path)
    if unknown := unknown_operators(package):
        raise ConfigError(
            "the evaluator lacks operators, so that the package cannot be checked",
            where=path.name,
            got=", ".join(unknown),
            hint="add them to targets/coreml/kernels.py",
        )
    return LoweredComponent(
        graph=graph,
        operators={f"mil::{name}": count for name, count in built.operators.items()},
        weight_bytes=built.weight_bytes,
        kept_in_float=built.kept_in_float,
        functions=tuple(_entry(made) for made in built.functions),
        exceptions=built.exceptions,
        advice=lint(package),
    )


def _entry(made: Made) -> FunctionEntry:
    def of(kind: str) -> tuple[TensorEntry, ...]:
        return tuple(_tensor(each) for each in made.tensors if each.kind == kind)

    return FunctionEntry(
        name=made.name,
        entry_point=made.entry_point,
        inputs=of("input"),
        outputs=of("output"),
        states=of("state"),
    )


def _tensor(tensor: Tensor) -> TensorEntry:
    return TensorEntry(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape)  # type: ignore[arg-type]


TARGETS: tuple[Target, ...] = (CoreMl(),)
