"""What every format tells about a weight file, and what all of them refuse alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lorgnette.errors import CheckpointError

if TYPE_CHECKING:
    import torch

FLOAT_DTYPES = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, known without reading it."""

    shape: tuple[int, ...]
    dtype: str
    """As the format spells it: `BF16`, `F16`, `F32`, in GGUF also `Q8_0`."""
    shard: str
    """The file, relative to `Checkpoint.path`; empty where that is the file itself."""


class TensorSource(Protocol):
    """What tensors are read from by name: a weight file, or a checkpoint."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the source."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor as float32, its own copy."""


def check_float(name: str, dtype: str, where: Path, *more: str) -> None:
    """Refuses to read what holds no weights, such as a buffer of position ids.

    Args:
        name: The tensor.
        dtype: Its dtype as the format spells it.
        where: The file.
        more: What the format can read besides the plain float dtypes.

    Raises:
        CheckpointError: The dtype is none of them.
    """
    if dtype not in FLOAT_DTYPES + more:
        raise CheckpointError(
            f"tensor '{name}' is not a float tensor",
            where=where,
            got=dtype,
            wanted=", ".join(FLOAT_DTYPES + more),
        )
