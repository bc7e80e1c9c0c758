"""Peephole fusions on the finished graph."""

from __future__ import annotations

import onnx_ir as ir

from lorgnette.targets.onnx.graph import BROADCASTS, CONTRIB

SKIP_FORMS = {
    "SimplifiedLayerNormalization": "SkipSimplifiedLayerNormalization",
    "LayerNormalization": "SkipLayerNormalization",
}


def fuse_skip_norms(model: ir.Model) -> int:
    """Joins a residual addition with the normalisation behind it.

    Before: `sum = Add(a, b)`, `y = Norm(sum, gamma[, beta])`, `sum` used further on.
    After: `y, _, _, sum = SkipNorm(a, b, gamma[, beta])`.

    Done only where both operands of the addition are computed values of one shape and no weight:
    the fused operator does not repeat them.

    Returns:
        How many pairs were joined.
    """
    graph = model.graph
    joined = 0
    for node in list(graph):
        fused = SKIP_FORMS.get(node.op_type)
        total = node.inputs[0] if fused is not None else None
        add = total.producer() if total is not None else None
        if fused is None or total is None or add is None or add.op_type != "Add":
            continue
        if add.meta.get(BROADCASTS) or any(v is None or v.is_initializer() for v in add.inputs):
            continue
        skip = ir.Node(
            CONTRIB,
            fused,
            [*add.inputs, *node.inputs[1:]],
            attributes=[ir.AttrFloat32("epsilon", node.attributes["epsilon"].as_float())],
            num_outputs=4,
            name=f"Skip{node.name}",
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
