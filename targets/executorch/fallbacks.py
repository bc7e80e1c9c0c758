"""What a partitioner left outside its delegate, and where that was written."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import torch

import lorgnette
from lorgnette.manifest import Fallback

ROOT = Path(lorgnette.__file__).resolve().parent.parent
FRAME = re.compile(r'File "([^"]+)", line (\d+)')
PARTS = ("export", "quantize", "targets")
"""Folders that stand both at the root of the repository and, as links, in the package."""
REASONS = {
    "aten.embedding.default": "rows are looked up by the CPU kernel",
    "aten._to_copy.default": "bytes become floats in the CPU kernel",
    "dim_order_ops._to_dim_order_copy.default": "bytes become floats in the CPU kernel",
    "llama.custom_sdpa.default": "ExecuTorch's own kernel reads the KV cache",
    "llama.update_cache.default": "ExecuTorch's own kernel writes the KV cache",
    "aten.slice_copy.Tensor": "where it cuts is known only at run time",
    "aten.select_copy.int": "where it cuts is known only at run time",
    "aten._local_scalar_dense.default": "a position is read as a number",
    "quantized_decomposed.embedding_4bit.default": "rows are looked up by the CPU kernel",
    "quantized_decomposed.embedding_byte.default": "rows are looked up by the CPU kernel",
}
NOT_TAKEN = "the partitioner does not take it"


def operator_name(node: torch.fx.Node) -> str:
    """The operator of a node in short, e.g. `aten.embedding.default`; empty of what computes none.

    Delegates, their outputs, assertions and arithmetic of sizes compute nothing.
    """
    if node.op != "call_function":
        return ""
    target = str(node.target)
    if target.startswith("auto_functionalized"):
        target = str(node.args[0])
    found = re.search(r"EdgeOpOverload: ([\w.]+)", target)
    name = found[1] if found else target
    silent = ("<built-in", "executorch_call_delegate", "aten.sym_size", "aten._assert_scalar")
    return "" if name.startswith((*silent, "aten.sym_constrain")) else name


def source_of(node: torch.fx.Node) -> str:
    """The innermost line of this package that a node was traced from, e.g. `export/trace.py:32`."""
    for path, line in reversed(FRAME.findall(str(node.meta.get("stack_trace") or ""))):
        parts = Path(path).parts
        for at in range(len(parts) - 1, 0, -1):
            short = parts[at:]
            if short[0] in PARTS and ROOT.joinpath(*short).is_file():
                return f"{'/'.join(short)}:{line}"
    return ""


def left_outside(graph: torch.fx.Graph) -> tuple[Fallback, ...]:
    """Every operator outside delegates, by operator and line."""
    counts = Counter(
        (name, source_of(node)) for node in graph.nodes if (name := operator_name(node))
    )
    return tuple(
        Fallback(
            operator=operator,
            source=source,
            count=count,
            reason=REASONS.get(operator, NOT_TAKEN),
        )
        for (operator, source), count in sorted(counts.items())
    )


def operator_counts(graph: torch.fx.Graph) -> dict[str, int]:
    """How often each operator stands in a lowered graph, delegates as one each."""
    names = [operator_name(node) for node in graph.nodes]
    calls = sum(str(node.target) == "executorch_call_delegate" for node in graph.nodes)
    counts = Counter(name for name in names if name)
    return {**({"delegate": calls} if calls else {}), **dict(sorted(counts.items()))}
