"""The target `onnx-cpu`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lorgnette.quantize.plan import PLANS, QuantPlan
from lorgnette.spec import ModelSpec
from lorgnette.targets.target import Capabilities, LoweredComponent, Target

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from lorgnette.export.component import Component
    from lorgnette.export.weights import WeightSource
    from lorgnette.targets.onnx.weight_file import WeightFile

GRAPHS = "graphs"
WEIGHTS = "weights.bin"


class OnnxLowering:
    """An export to ONNX under way."""

    def __init__(self, folder: Path, plan: QuantPlan, weights: WeightFile) -> None:
        """Writes graphs to `folder`, beside the weight file that they share."""
        self._folder = folder
        self._plan = plan
        self._weights = weights

    def add(
        self, component: Component, program: ExportedProgram, source: WeightSource
    ) -> LoweredComponent:
        """Lowers one component; its weights are read, packed and written one by one."""
        import onnx_ir as ir

        from lorgnette.targets.onnx.fuse import fuse_quick_gelus, fuse_skip_norms
        from lorgnette.targets.onnx.graph import GraphBuilder, build_graph

        builder = GraphBuilder(component, source, self._plan, self._weights)
        model = build_graph(builder, program)
        fuse_skip_norms(model)
        fuse_quick_gelus(model)
        operators = Counter(f"{node.domain or 'ai.onnx'}::{node.op_type}" for node in model.graph)
        path = self._folder / GRAPHS / f"{component.name}.onnx"
        ir.save(model, path)
        return LoweredComponent(
            graph=f"{GRAPHS}/{path.name}",
            operators=dict(sorted(operators.items())),
            weight_bytes=dict(sorted(builder.weight_bytes.items())),
            kept_in_float=builder.kept_in_float,
        )


class OnnxCpu:
    """ONNX graphs with onnxruntime's contrib operators, for its CPU engine."""

    name = "onnx-cpu"
    capabilities = Capabilities(
        plans=tuple(PLANS),
        cache_style="functional",
        engine="onnxruntime",
        engine_min_version="1.24.2",
        summary="onnxruntime on any CPU: Linux, macOS, Windows, Android, iOS",
    )

    def check(self, spec: ModelSpec, plan: QuantPlan) -> Sequence[str]:
        """Every reason why this model cannot be lowered so; empty where it can."""
        problems = []
        if plan.name not in self.capabilities.plans:
            problems.append(f"scheme '{plan.name}' is not one of {self.capabilities.plans}")
        table = plan.scheme_for("token_embedding", "table.weight")
        if table.is_integer and spec.text.hidden_size % table.group_size:
            problems.append(
                f"the embedding width {spec.text.hidden_size} is not a multiple of "
                f"{table.group_size}, so '{plan.name}' cannot gather it; use fp32 or fp16"
            )
        return problems

    @contextmanager
    def open(self, folder: Path, plan: QuantPlan) -> Iterator[OnnxLowering]:
        """Starts an export into an empty folder."""
        from lorgnette.targets.onnx.weight_file import WeightFile

        (folder / GRAPHS).mkdir()
        with WeightFile(folder / GRAPHS / WEIGHTS) as weights:
            yield OnnxLowering(folder, plan, weights)

    def write_exact(self, graph: Path, out: Path) -> None:
        """Writes a twin of a lowered graph that has the same weights and rounds no activations."""
        import onnx_ir as ir

        from lorgnette.targets.onnx.integer_matmul import without_rounding

        model = ir.load(graph)
        for node in model.graph:
            if "accuracy_level" in node.attributes:
                node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
        without_rounding(model)
        ir.save(model, out)


TARGETS: tuple[Target, ...] = (OnnxCpu(),)
