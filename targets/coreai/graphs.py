"""The graphs of a converted program: put in one order, and what stands in them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from coreai._compiler.ir import (
    Attribute,
    DenseResourceElementsAttr,
    InsertionPoint,
    Location,
    Module,
    OpView,
    StringAttr,
    SymbolTable,
)
from coreai.authoring import AIProgram
from numpy.typing import NDArray

from lorgnette.targets.coreai.constants import resource, tensor_type

BLOB_HEADER_BYTES = 4
"""A blob is printed with its alignment in front."""
Graphs = Mapping[str, OpView]


def in_order(program: AIProgram, functions: Sequence[str]) -> dict[str, dict[str, int]]:
    """Names and places the graphs of composite operators, and counts operators by function.

    Their names are random, the converter's order follows from names, and constants that it has
    computed are named by a hash that differs from run to run. Named by first use and placed so,
    functions last, the same model gives the same bytes.

    Returns:
        For each function how often each operator stands in it; composite ones are called
        `composite::name`.
    """
    module = program._module._mlir_module
    graphs = graphs_of(program)
    kinds: dict[str, str] = {}
    for name in functions:
        for callee in _used(graphs, name):
            template = graphs[callee].attributes["template_op"]
            kinds.setdefault(callee, StringAttr(template).value)
    counts = {name: _count(graphs[name], kinds) for name in functions}
    last = list(module.body.operations)[-1]
    for name in (*kinds, *functions):
        graph = graphs[name]
        if graph.operation != last.operation:
            graph.operation.move_after(last.operation)
        last = graph
    for index, (old, kind) in enumerate(kinds.items()):
        SymbolTable.replace_all_symbol_uses(old, f"{kind}_{index}", module.operation)
        SymbolTable.set_symbol_name(graphs[old], f"{kind}_{index}")
    with module.context, Location.unknown():
        _name_computed(graphs[name] for name in (*kinds, *functions))
    return counts


def _name_computed(graphs: Iterable[OpView]) -> None:
    named: dict[str, Attribute] = {}
    for graph in graphs:
        for op in operators_of(graph):
            name = resource_name(op)
            if name.startswith("resource_"):
                if name not in named:
                    held = tensor_type(op.operation.result)
                    shape, data = tuple(held.shape), resource_bytes(op)
                    called = f"computed_{len(named)}"
                    named[name] = resource(called, held.element_type, shape, data)
                op.attributes["value"] = named[name]


def resource_name(op: OpView) -> str:
    """The name of a constant that is kept apart from the operators; empty for any other."""
    if op.operation.name != "coreai.constant":
        return ""
    value = op.attributes["value"]
    if not DenseResourceElementsAttr.isinstance(value):
        return ""
    found = re.match(r'dense_resource<"?([^">]+)"?>', str(value))
    return found[1] if found else ""


def resource_bytes(op: OpView) -> NDArray[np.uint8]:
    """The bytes of such a constant.

    There is no other way to them than to print a program that holds nothing else.
    """
    with op.operation.context, Location.unknown():
        alone = Module.create()
        op.operation.clone(ip=InsertionPoint(alone.body))
        printed = str(alone.operation.get_asm())
    blob = re.search(r'dialect_resources:.*?"0x([0-9A-Fa-f]*)"', printed, re.DOTALL)
    if blob is None:
        raise ValueError(f"constant {resource_name(op)} has no bytes")
    return np.frombuffer(bytes.fromhex(blob[1]), np.uint8)[BLOB_HEADER_BYTES:]


def graphs_of(program: AIProgram) -> dict[str, OpView]:
    """Functions and composite operators, by name."""
    return {
        SymbolTable.get_symbol_name(op).value: op
        for op in program._module._mlir_module.body.operations
        if op.operation.name == "coreai.graph"
    }


def operators_of(graph: OpView) -> Iterator[OpView]:
    """The operators of a graph, in order."""
    (region,) = graph.regions
    yield from region.blocks[0].operations


def _callee(op: OpView) -> str:
    found = re.search(r"@([\w$.]+)", str(op.attributes["callee"]))
    return found[1] if found else ""


def _used(graphs: Graphs, name: str) -> Iterator[str]:
    """Composite operators that a graph uses, those within others first."""
    for op in operators_of(graphs[name]):
        if op.operation.name == "coreai.invoke":
            yield from _used(graphs, _callee(op))
            yield _callee(op)


def _count(graph: OpView, kinds: Mapping[str, str]) -> dict[str, int]:
    found = Counter(
        f"composite::{kinds[_callee(op)]}"
        if op.operation.name == "coreai.invoke"
        else op.operation.name
        for op in operators_of(graph)
    )
    return dict(sorted(found.items()))
