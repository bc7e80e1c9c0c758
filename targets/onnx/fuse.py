"""Peephole fusions on the finished graph."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lorgnette.targets.onnx.graph import BROADCASTS, CONTRIB

NORM, SKIP_NORM = "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"


def fuse_skip_norms(model: ir.Model) -> int:
    """Joins a residual addition with the RMS normalisation behind it.

    Before: `sum = Add(a, b)`, `y = SimplifiedLayerNormalization(sum, gamma)`, `sum` used further
    on. After: `y, _, _, sum = SkipSimplifiedLayerNormalization(a, b, gamma)`.

    Done only where both operands of the addition are computed values of one shape and no weight:
    the fused operator does not repeat them. Layer normalisation with a mean stays apart from its
    addition: onnxruntime's fused operator takes several times as long as the two on a CPU
    (`python -m benchmarks.operators`).

    Returns:
        How many pairs were joined.
    """
    graph = model.graph
    joined = 0
    for node in list(graph):
        total = node.inputs[0] if node.op_type == NORM else None
        add = total.producer() if total is not None else None
        if total is None or add is None or add.op_type != "Add":
            continue
        if add.meta.get(BROADCASTS) or any(v is None or v.is_initializer() for v in add.inputs):
            continue
        skip = ir.Node(
            CONTRIB,
            SKIP_NORM,
            [*add.inputs, *node.inputs[1:]],
            attributes=[ir.AttrFloat32("epsilon", node.attributes["epsilon"].as_float())],
            num_outputs=4,
            name=_renamed(node, SKIP_NORM),
        )
        normed, mean, variance, residual = skip.outputs
        normed.name, residual.name = node.outputs[0].name, total.name
        mean.name = variance.name = ""
        graph.insert_before(add, skip)
        total.replace_all_uses_with(residual, replace_graph_outputs=True)
        node.outputs[0].replace_all_uses_with(normed, replace_graph_outputs=True)
        graph.remove([node, add], safe=True)
        joined += 1
    return joined


def fuse_quick_gelus(model: ir.Model) -> int:
    """Joins the three operators of a quick GELU.

    Before: `scaled = Mul(x, alpha)`, `gate = Sigmoid(scaled)`, `y = Mul(x, gate)`.
    After: `y = QuickGelu(x)` with that alpha.

    Done only where alpha is one constant number and neither `scaled` nor `gate` is used elsewhere.

    Returns:
        How many were joined.
    """
    graph = model.graph
    joined = 0
    for node in list(graph):
        if node.op_type != "Sigmoid":
            continue
        (scaled,), (gate,) = node.inputs, node.outputs
        scale = scaled.producer() if scaled is not None else None
        multiply = _only_user(gate)
        if scale is None or multiply is None or _only_user(scale.outputs[0]) is not node:
            continue
        if scale.op_type != "Mul" or multiply.op_type != "Mul":
            continue
        x, alpha = scale.inputs
        number = alpha.const_value if alpha is not None else None
        if number is None or number.size != 1 or not _are(multiply.inputs, x, gate):
            continue
        gelu = ir.Node(
            CONTRIB,
            "QuickGelu",
            [x],
            attributes=[ir.AttrFloat32("alpha", float(number.numpy()))],
            name=_renamed(multiply, "QuickGelu"),
        )
        (out,) = multiply.outputs
        gelu.outputs[0].name = out.name
        graph.insert_before(scale, gelu)
        out.replace_all_uses_with(gelu.outputs[0], replace_graph_outputs=True)
        graph.remove([multiply, node, scale], safe=True)
        if alpha is not None and not alpha.uses():  # engines warn of weights that nothing reads
            del graph.initializers[str(alpha.name)]
        joined += 1
    return joined


def _renamed(node: ir.Node, operator: str) -> str:
    """A name for a node that takes another's place: of the same module, with the same number."""
    module, _, rest = str(node.name).rpartition("/")
    return f"{module}/{operator}_{rest.rpartition('_')[2]}"


def _only_user(value: ir.Value) -> ir.Node | None:
    users = [usage.node for usage in value.uses()]
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


def _are(found: Sequence[ir.Value | None], one: ir.Value | None, other: ir.Value | None) -> bool:
    """Whether `found` is these two, in either order."""
    return (found[0] is one and found[1] is other) or (found[0] is other and found[1] is one)
