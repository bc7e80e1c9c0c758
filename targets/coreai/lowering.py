"""The target `coreai`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorgnette.manifest import Manifest
from lorgnette.quantize.plan import QuantPlan
from lorgnette.quantize.scheme import GROUP_SIZES
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
    from lorgnette.quantize.store import QuantizedModel
    from lorgnette.targets.coreai.constants import Constants
    from lorgnette.targets.coreai.convert import Function

FLOATS = SchemeRange(bits=(16, 32))
EITHER = (True, False)
# Every one of these was run on Linux by coreai-core 1.0.0b3 and gave what the codes stand for.
# Scales of 8 bits would be stored as float32, which is not what such a plan asks for.
MATRICES = (
    FLOATS,
    SchemeRange(bits=(2, 4, 8), groups=GROUP_SIZES, symmetric=EITHER, scale_bits=(32, 16)),
    SchemeRange(bits=(2, 4, 8), symmetric=EITHER, scale_bits=(32, 16)),
    SchemeRange(bits=(4, 8), per_tensor=(True,)),
    SchemeRange(bits=(4, 6, 8), palette=True),
)
TABLES = (
    FLOATS,
    SchemeRange(bits=(2, 4, 8), groups=(0, *GROUP_SIZES), symmetric=EITHER, scale_bits=(32, 16)),
)

GRAPHS = "graphs"
VISION = f"{GRAPHS}/vision.aimodel"
TEXT = f"{GRAPHS}/text.aimodel"
"""Table and decoder in one asset: its functions share constants, and a head that is the table."""


class CoreAi:
    """Core AI assets; the same library runs them on Linux that converts them."""

    name = "coreai"
    capabilities = Capabilities(
        matrices=MATRICES,
        tables=TABLES,
        activations={"int8_group": "float", "int8_token": "float", "int8_static": "float"},
        # The Linux engine adds up products of float16 in float16: 0.6 % off for a sum of 1,536,
        # 1.6 % for 12,288, at a hundredth of the speed of float32. Nothing could be proven so.
        arithmetic="float32",
        cache_style="state",
        cache_bits=(32,),
        tile_counts=(1,),
        engine="coreai",
        engine_min_version="1.0.0b3",
        engine_package="coreai-core",
        packages=("coreai-core", "coreai-torch"),
        extra="coreai",
        os_floor="iOS 27, macOS 27",
        summary="Core AI on iOS and macOS 27; runs on Linux, too",
    )

    def missing(self) -> str:
        """What lowering needs and this machine lacks, with what to do; empty where nothing is."""
        return lacking("coreai", "coreai", "coreai_torch")

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
        """Writes the two assets; constants are made one by one as the converter asks for them."""
        from lorgnette.targets.coreai.constants import Constants
        from lorgnette.targets.coreai.convert import Function, write_asset

        (folder / GRAPHS).mkdir(exist_ok=True)
        components = {component.name: component for component in parts.components}
        vision, table, decoder = (
            components[name] for name in ("vision_encoder", "token_embedding", "decoder")
        )
        assets = {
            VISION: (Function("encode", vision, {"G": 1}),),
            TEXT: (
                Function("embed", table, {}),
                Function("prefill", decoder, {}),
                Function("decode", decoder, {"T": 1}),
            ),
        }
        lowered: dict[str, LoweredComponent] = {}
        for graph, functions in assets.items():
            constants = Constants(quantized.sources)
            counts = write_asset(folder / graph, functions, quantized.sources, constants, progress)
            for name in dict.fromkeys(function.component.name for function in functions):
                of_it = [each for each in functions if each.component.name == name]
                lowered[name] = _report(graph, of_it, counts, constants)
        return [lowered[component.name] for component in parts.components]

    def exact_twin(self, folder: Path, manifest: Manifest) -> Manifest | None:
        """None: what ships computes in float32 and rounds no activations."""
        return None


def _report(
    graph: str,
    functions: Sequence[Function],
    counts: dict[str, dict[str, int]],
    constants: Constants,
) -> LoweredComponent:
    """What is known of a component: operators of its functions, added up."""
    name = functions[0].component.name
    operators: dict[str, int] = {}
    for function in functions:
        for operator, count in counts[function.name].items():
            operators[operator] = operators.get(operator, 0) + count
    return LoweredComponent(
        graph=graph,
        operators=dict(sorted(operators.items())),
        weight_bytes=dict(sorted(constants.weight_bytes[name].items())),
        kept_in_float={},
        functions=tuple(function.entry() for function in functions),
        exceptions=tuple(sorted(constants.exceptions[name])),
    )


TARGETS: tuple[Target, ...] = (CoreAi(),)
