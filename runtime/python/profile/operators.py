"""Where the time goes inside the graphs, by the engine's own profiler."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

from lorgnette.errors import ProfileError
from lorgnette.manifest import DAMAGE
from lorgnette.runtime.engines.engine import OperatorTrace
from lorgnette.runtime.profile.document import OperatorGroup, OperatorNode, OperatorPhase

SUFFIX = "_kernel_time"
"""What onnxruntime puts behind a node's name."""
NO_MODULE = "the engine made this node, or the graph's name of it holds no module"
_MODULE = re.compile(r"(?:fused )?([A-Za-z_]\w*(?:\.\w+)*)/")


class Window(NamedTuple):
    """When an entry point ran, by `time.monotonic_ns`."""

    start_ns: int
    end_ns: int


@dataclass
class Entry:
    """The runs of one entry point.

    Attributes:
        component: Whose it is.
        what: What one run is.
        windows: When they were.
    """

    component: str
    what: str
    windows: list[Window]

    def note(self, start_ns: int) -> float:
        """Ends a run that began then; its milliseconds."""
        end_ns = time.monotonic_ns()
        self.windows.append(Window(start_ns, end_ns))
        return (end_ns - start_ns) / 1e6


class _Arguments(msgspec.Struct):
    op_name: str = ""


class _Event(msgspec.Struct):
    cat: str = ""
    name: str = ""
    ts: int = 0
    dur: int = 0
    tid: int = 0
    args: _Arguments = msgspec.field(default_factory=_Arguments)


def operator_phases(
    traces: Sequence[OperatorTrace], entries: dict[str, Entry]
) -> dict[str, OperatorPhase]:
    """The tables of every entry point.

    Args:
        traces: What the engine wrote.
        entries: When it ran, by entry point.

    Raises:
        ProfileError: A trace cannot be read, or tells nothing of an entry point.
    """
    found = {}
    for name, entry in entries.items():
        spent: dict[tuple[str, str], int] = {}
        for trace in traces:
            if trace.component == entry.component:
                _add(spent, _nodes(trace), trace.start_ns, entry.windows)
        if not spent:
            raise ProfileError("the engine's profile tells of no operator", where=name)
        found[name] = _table(entry, spent)
    return found


def module_of(node: str) -> str | None:
    """The module that a node's name begins with, as in `tower.layers.3.mlp.fc1/MatMul_12`."""
    match = _MODULE.match(node)
    return match[1] if match else None


def collapsed(module: str) -> str:
    """A module's name without the numbers of layers: `tower.layers.*.mlp.fc1`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module)


def _nodes(trace: OperatorTrace) -> list[_Event]:
    """Events of nodes in order; those inside of another node, as in a loop, count as part of it."""
    try:
        events = msgspec.json.decode(Path(trace.path).read_bytes(), type=list[_Event])
    except (OSError, *DAMAGE) as error:
        where = trace.component
        raise ProfileError("the engine's profile cannot be read", where=where, got=error) from error
    nodes = [event for event in events if event.cat == "Node" and event.name.endswith(SUFFIX)]
    outer: list[_Event] = []
    end = -1
    for event in sorted(nodes, key=lambda event: (event.ts, -event.dur)):
        if event.ts + event.dur <= end and event.ts < end:
            continue
        outer.append(event)
        end = event.ts + event.dur
    return outer


def _add(
    spent: dict[tuple[str, str], int],
    events: Iterable[_Event],
    start_ns: int,
    windows: Sequence[Window],
) -> None:
    """Adds microseconds by node and operator of the events within windows."""
    for event in events:
        middle = start_ns + event.ts * 1000 + event.dur * 500
        if any(window.start_ns <= middle <= window.end_ns for window in windows):
            key = (event.name.removesuffix(SUFFIX), event.args.op_name or "unknown")
            spent[key] = spent.get(key, 0) + event.dur


def _table(entry: Entry, spent: dict[tuple[str, str], int]) -> OperatorPhase:
    """Nodes and their groups, the largest first."""
    runs = len(entry.windows)
    total = max(sum(spent.values()), 1)
    nodes = []
    groups: dict[tuple[str | None, str], tuple[int, int]] = {}
    for (name, operator), spent_us in sorted(spent.items(), key=lambda item: -item[1]):
        module = module_of(name)
        nodes.append(
            OperatorNode(
                node=name,
                module=module,
                operator=operator,
                ms=spent_us / 1e3 / runs,
                share=spent_us / total,
                reason="" if module else NO_MODULE,
            )
        )
        key = (collapsed(module) if module else None, operator)
        count, sum_us = groups.get(key, (0, 0))
        groups[key] = (count + 1, sum_us + spent_us)
    ordered = sorted(groups.items(), key=lambda item: -item[1][1])
    wall_ns = sum(window.end_ns - window.start_ns for window in entry.windows)
    return OperatorPhase(
        component=entry.component,
        what=entry.what,
        runs=runs,
        wall_ms=wall_ns / 1e6 / runs,
        operators_ms=total / 1e3 / runs,
        groups=tuple(
            OperatorGroup(
                module=module,
                operator=operator,
                nodes=count,
                ms=sum_us / 1e3 / runs,
                share=sum_us / total,
                reason="" if module else NO_MODULE,
            )
            for (module, operator), (count, sum_us) in ordered
        ),
        nodes=tuple(nodes),
    )
