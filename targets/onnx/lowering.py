"""The target `onnx-cpu`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from lorgnette.bundle import list_files
from lorgnette.manifest import CACHE8, FunctionEntry, Manifest, TensorEntry
from lorgnette.quantize.plan import QuantPlan
from lorgnette.quantize.scheme import GROUP_SIZES, Activations, ScaleBits
from lorgnette.targets.capabilities import (
    Capabilities,
    Matrix,
    SchemeRange,
    scheme_problems,
    some,
)
from lorgnette.targets.target import LoweredComponent, Target

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch.export import ExportedProgram

    from lorgnette.export.check import Parts
    from lorgnette.export.component import Component
    from lorgnette.quantize.store import QuantizedModel, QuantizedSource
    from lorgnette.targets.onnx.graph import GraphBuilder
    from lorgnette.targets.onnx.weight_file import WeightFile

FLOATS = SchemeRange(bits=(16, 32))
EITHER = (True, False)
SCALE_BITS: tuple[ScaleBits, ...] = (32, 16, 8)
ROUNDED: tuple[Activations, ...] = ("int8_token", "int8_static")
# Found by running every combination in onnxruntime 1.24.2 and 1.32.0 on a CPU: MatMulNBits has 2,
# 4 and 8 bits and groups of a power of two from 16; GatherBlockQuantized the same, but 1.24 no 2
# bits. With int8_group, MatMulNBits of 2 bits rounds activations only in 1.32 and in groups of 32
# to 128; elsewhere it multiplies in float32, which loses less. MatMulIntegerToFloat has one scale
# a row, in which groups fit where theirs are multiples of that.
MATRICES = (
    FLOATS,
    SchemeRange(
        bits=(2, 4, 8),
        groups=GROUP_SIZES,
        symmetric=EITHER,
        activations=("float", "int8_group"),
        scale_bits=SCALE_BITS,
    ),
    SchemeRange(bits=(4, 8), activations=ROUNDED, per_tensor=(False, True)),
    SchemeRange(bits=(4,), groups=GROUP_SIZES, activations=ROUNDED, scale_bits=(8,)),
)
TABLES = (
    FLOATS,
    SchemeRange(bits=(4, 8), groups=GROUP_SIZES, symmetric=EITHER, scale_bits=SCALE_BITS),
)

MANY_POSITIONS = 192
"""From so many new positions on the prefill graph is taken. With its weights made it is the faster
one from about 64 on (`python -m benchmarks.operators --bundle`), but loading it and making them
takes longer than it then wins over hundreds, and memory: not for one tile and a short question."""
PREFILL = "prefill"
GRAPHS = "graphs"
WEIGHTS = "weights.bin"


class OnnxLowering:
    """An export to ONNX under way."""

    def __init__(self, folder: Path, weights: WeightFile) -> None:
        """Writes graphs to `folder`, beside the weight file that they share."""
        self._folder = folder
        self._weights = weights

    def add(
        self, component: Component, program: ExportedProgram, source: QuantizedSource
    ) -> LoweredComponent:
        """Lowers one component; its weights are read, packed and written one by one."""
        from lorgnette.export.component import with_cache_bits
        from lorgnette.targets.onnx.graph import GraphBuilder
        from lorgnette.targets.onnx.many_positions import is_recoded

        stored = with_cache_bits(component, source.cache_bits)
        builder = GraphBuilder(stored, source, self._weights)
        graph, operators = self.write(builder, program, component.name)
        lowered = LoweredComponent(
            graph=graph,
            operators=operators,
            weight_bytes=dict(sorted(builder.weight_bytes.items())),
            kept_in_float=builder.kept_in_float,
        )
        schemes = (source.rule(name).scheme for name in source.matrices)
        if PREFILL not in component.entry_points or not any(map(is_recoded, schemes)):
            return lowered
        graph, weights = self.add_many(stored, program, source)
        prefill = FunctionEntry(
            name=PREFILL,
            entry_point=PREFILL,
            inputs=(),
            outputs=(),
            graph=graph,
            positions=MANY_POSITIONS,
            weights=weights,
        )
        return msgspec.structs.replace(lowered, functions=(prefill,))

    def add_many(
        self, component: Component, program: ExportedProgram, source: QuantizedSource
    ) -> tuple[str, str]:
        """Writes the graph for many positions, and the one that makes its weights: their files."""
        from lorgnette.targets.onnx.graph import GraphBuilder
        from lorgnette.targets.onnx.many_positions import weights_graph

        builder = GraphBuilder(component, source, self._weights, many_positions=True)
        graph, _ = self.write(builder, program, PREFILL)
        empty = GraphBuilder(component, source, self._weights)
        weights = weights_graph(empty, builder.made_weights)
        return graph, self._save(weights, f"{PREFILL}_weights")

    def write(
        self, builder: GraphBuilder, program: ExportedProgram, name: str
    ) -> tuple[str, dict[str, int]]:
        """Builds and writes a graph; gives its file, and how often each operator is in it."""
        from lorgnette.targets.onnx.fuse import fuse_quick_gelus, fuse_skip_norms
        from lorgnette.targets.onnx.graph import build_graph

        model = build_graph(builder, program)
        fuse_skip_norms(model)
        fuse_quick_gelus(model)
        operators = Counter(f"{node.domain or 'ai.onnx'}::{node.op_type}" for node in model.graph)
        return self._save(model, name), dict(sorted(operators.items()))

    def _save(self, model: ir.Model, name: str) -> str:
        """Writes a graph and gives its file, from the bundle's folder."""
        import onnx_ir as ir

        path = self._folder / GRAPHS / f"{name}.onnx"
        ir.save(model, path)
        return f"{GRAPHS}/{path.name}"


class OnnxCpu:
    """ONNX graphs with onnxruntime's contrib operators, for its CPU engine."""

    name = "onnx-cpu"
    capabilities = Capabilities(
        matrices=MATRICES,
        tables=TABLES,
        cache_style="functional",
        cache_bits=(32, 8),
        engine="onnxruntime",
        engine_package="onnxruntime",
        packages=("onnx-ir", "onnxruntime"),
        engine_min_version="1.24.2",
        extra="export",
        os_floor="any system of onnxruntime: Android 7, iOS 13, Linux, macOS, Windows",
        summary="onnxruntime on any CPU: Linux, macOS, Windows, Android, iOS",
    )

    def check(self, matrices: Sequence[Matrix], plan: QuantPlan) -> Sequence[str]:
        """Every reason why a model of these matrices cannot be lowered so; empty where it can."""
        problems = scheme_problems(self.capabilities, plan, matrices)
        for table in (matrix for matrix in matrices if matrix.gathered):
            scheme = plan.scheme_for(table.component, table.name)
            if not scheme.is_integer or not scheme.group_size:
                continue
            if table.columns % scheme.group_size:
                problems.append(
                    f"the width {table.columns} of {some([table])} is not a multiple of "
                    f"{scheme.group_size}, so it cannot be gathered as {scheme.form}; "
                    "use other groups, fp32 or fp16"
                )
            elif not scheme.symmetric and scheme.groups(table.columns) * scheme.bits % 8:
                # onnxruntime 1.24 reads packed zero points on across the ends of rows.
                problems.append(
                    f"{some([table])} has {scheme.groups(table.columns)} groups a row, whose zero "
                    f"points of {scheme.bits} bits do not fill whole bytes, so it cannot be "
                    f"gathered as {scheme.form}; use smaller groups or a symmetric scheme"
                )
        return problems

    def missing(self) -> str:
        """Nothing beyond what every export needs."""
        return ""

    def lower(
        self,
        parts: Parts,
        quantized: QuantizedModel,
        folder: Path,
        progress: Callable[[str], None],
    ) -> list[LoweredComponent]:
        """Writes a graph a component, and one file of weights that all share."""
        from lorgnette.export.trace import trace

        lowered = []
        with self.open(folder) as lowering:
            for component in parts.components:
                progress(f"lower {component.name}")
                source = quantized.sources[component.name]
                lowered.append(lowering.add(component, trace(component), source))
        return lowered

    def exact_twin(self, folder: Path, manifest: Manifest) -> Manifest | None:
        """Graphs beside the bundle's own, which differ in an attribute of each multiplication."""
        components = []
        for entry in manifest.components:
            graph = folder / entry.graph
            twin = graph.with_name(f"exact_{graph.name}")
            self.write_exact(graph, twin)
            components.append(
                msgspec.structs.replace(
                    entry,
                    graph=twin.relative_to(folder).as_posix(),
                    functions=(),
                    cache_inputs=_in_float(entry.cache_inputs),
                    cache_outputs=_in_float(entry.cache_outputs),
                )
            )
        return msgspec.structs.replace(
            manifest,
            requires=tuple(name for name in manifest.requires if name != CACHE8),
            components=tuple(components),
            files=list_files(folder),
        )

    @contextmanager
    def open(self, folder: Path) -> Iterator[OnnxLowering]:
        """Starts an export into an empty folder."""
        from lorgnette.targets.onnx.weight_file import WeightFile

        (folder / GRAPHS).mkdir()
        with WeightFile(folder / GRAPHS / WEIGHTS) as weights:
            yield OnnxLowering(folder, weights)

    def write_exact(self, graph: Path, out: Path) -> None:
        """Writes a twin of a lowered graph that has the same weights and rounds no activations."""
        import onnx_ir as ir

        from lorgnette.targets.onnx.cache import with_float_cache
        from lorgnette.targets.onnx.integer_matmul import without_rounding

        model = ir.load(graph)
        for node in model.graph:
            if "accuracy_level" in node.attributes:
                node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
        without_rounding(model)
        with_float_cache(model)
        ir.save(model, out)


def _in_float(tensors: Sequence[TensorEntry]) -> tuple[TensorEntry, ...]:
    return tuple(msgspec.structs.replace(entry, dtype="float32") for entry in tensors)


TARGETS: tuple[Target, ...] = (OnnxCpu(),)
