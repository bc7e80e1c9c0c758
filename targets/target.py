"""The protocol that every target fulfils."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lorgnette.spec import Frozen
from lorgnette.targets.capabilities import Capabilities, Matrix

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from lorgnette.export.component import Component
    from lorgnette.quantize.plan import QuantPlan
    from lorgnette.quantize.store import QuantizedSource


class LoweredComponent(Frozen, frozen=True):
    """One graph on disk, relative to the bundle, and what is in it."""

    graph: str
    operators: dict[str, int]
    """How often each operator stands in the graph, by `domain::name`."""
    weight_bytes: dict[str, int]
    """Bytes of weights by storage form; shared bytes count where they were stored first."""
    kept_in_float: dict[str, str]
    """Matrices that a plan wanted as integers and that stayed float, with the reason."""


class Lowering(Protocol):
    """One export under way: components go in, files appear in the folder."""

    def add(
        self, component: Component, program: ExportedProgram, source: QuantizedSource
    ) -> LoweredComponent:
        """Lowers one component; its weights are read, packed and written one by one."""


class Target(Protocol):
    """A named deployment."""

    name: str
    capabilities: Capabilities

    def check(self, matrices: Sequence[Matrix], plan: QuantPlan) -> Sequence[str]:
        """Every reason why a model of these matrices cannot be lowered so; empty where it can."""

    def open(self, folder: Path) -> AbstractContextManager[Lowering]:
        """Starts an export into an empty folder."""

    def write_exact(self, graph: Path, out: Path) -> None:
        """Writes a twin of a lowered graph that has the same weights and rounds no activations.

        Its KV cache is float32, too. What rounding activations would hide, the twin shows. It is
        checked and then thrown away; `out` lies beside the graph.
        """
