"""Weights in safetensors: a JSON header and the tensors behind it, memory-mapped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorgnette.errors import CheckpointError
from lorgnette.export.formats.weight_file import TensorInfo, check_float

if TYPE_CHECKING:
    import torch


class SafetensorsFile:
    """One safetensors file, mapped; nothing is copied until asked.

    Args:
        file: An existing file.

    Raises:
        CheckpointError: Its header does not fit it.
    """

    def __init__(self, file: Path) -> None:
        """Opens the file and reads its header."""
        from safetensors import SafetensorError, safe_open

        self._file = file
        try:
            opened: Any = safe_open(file, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                "weight file is damaged", where=file, got=error, hint="download it again"
            ) from error
        self._open = opened
        self.tensors: Mapping[str, TensorInfo] = {
            name: self._info(name)
            for name in opened.keys()  # noqa: SIM118  (not a dict)
        }

    def _info(self, name: str) -> TensorInfo:
        part = self._open.get_slice(name)
        return TensorInfo(tuple(part.get_shape()), str(part.get_dtype()), self._file.name)

    def read(self, name: str) -> torch.Tensor:
        """One tensor as float32, its own copy."""
        import torch

        check_float(name, self.tensors[name].dtype, self._file)
        tensor: torch.Tensor = self._open.get_tensor(name)
        return tensor.to(torch.float32, copy=True)
