"""The protocol that every target fulfils."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from lorgnette.manifest import Fallback, FunctionEntry, Manifest
from lorgnette.spec import Frozen
from lorgnette.targets.capabilities import Capabilities, Matrix

if TYPE_CHECKING:
    from lorgnette.export.check import Parts
    from lorgnette.quantize.plan import QuantPlan
    from lorgnette.quantize.store import QuantizedModel


class LoweredComponent(Frozen, frozen=True):
    """One component on disk, and what is in it."""

    graph: str
    """File or folder, relative to the bundle; several components may lie in one."""
    operators: dict[str, int]
    """How often each operator stands in the graph, by `domain::name`."""
    weight_bytes: dict[str, int]
    """Bytes of weights by storage form; shared bytes count where they were stored first."""
    kept_in_float: dict[str, str]
    """Matrices that a plan wanted as integers and that stayed float, with the reason."""
    functions: tuple[FunctionEntry, ...] = ()
    """What its functions really take, where the target has shapes or states of its own."""
    exceptions: tuple[str, ...] = ()
    """What is carried otherwise than the plan says, a line each."""
    fallbacks: tuple[Fallback, ...] = ()
    """Operators that run outside the target's delegate."""
    advice: tuple[str, ...] = ()
    """What would hinder the accelerator that the target is for, a line each; not measured."""


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix of integers, read back from the files of a bundle.

    Attributes:
        component: The component that it belongs to.
        name: Its name there.
        codes: uint8 `[rows, columns]`, 0 .. 2**bits - 1, as in `QuantTensor` without padding.
        scales: float32 `[rows, groups]`.
        bits: Bits of a code.
    """

    component: str
    name: str
    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    bits: int


class Target(Protocol):
    """A named deployment."""

    @property
    def name(self) -> str:
        """What a user calls it."""

    @property
    def capabilities(self) -> Capabilities:
        """What it can carry and what runs it."""

    def missing(self) -> str:
        """What lowering needs and this machine lacks, with what to do; empty where nothing is."""

    def check(self, matrices: Sequence[Matrix], plan: QuantPlan) -> Sequence[str]:
        """Every reason why a model of these matrices cannot be lowered so; empty where it can."""

    def lower(
        self,
        parts: Parts,
        quantized: QuantizedModel,
        folder: Path,
        progress: Callable[[str], None],
    ) -> list[LoweredComponent]:
        """Writes graphs below `folder`; one result for each of `parts.components`, in order."""

    def exact_twin(self, folder: Path, manifest: Manifest) -> Manifest | None:
        """The manifest of a twin with the same weights that rounds nothing as it computes.

        What rounding would hide, the twin shows. Its graphs may lie beside the bundle's own or be
        those under another engine; it is checked and then thrown away. None where there is none,
        or where what ships rounds nothing.
        """
