"""External data: one file that all graphs of a bundle share and the engine memory-maps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

PAGE_BYTES = 4096
SMALL_ALIGN_BYTES = 64

_IR_DTYPES = {
    np.dtype(np.float32): ir.DataType.FLOAT,
    np.dtype(np.float16): ir.DataType.FLOAT16,
    np.dtype(np.uint8): ir.DataType.UINT8,
    np.dtype(np.int8): ir.DataType.INT8,
}


class WeightFile:
    """Appends tensors to a file; the same key is stored once, however often it is asked for.

    Large tensors start on a page, so that mapping one touches no other; small ones on a cache
    line.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file for writing."""
        self.path = path
        self._file = path.open("wb")
        self._placed: dict[str, tuple[int, int, np.dtype[np.generic]]] = {}

    def __enter__(self) -> WeightFile:
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the file."""
        self._file.close()

    def has(self, key: str) -> bool:
        """Whether a tensor of that key is stored."""
        return key in self._placed

    def add(
        self,
        key: str,
        name: str,
        shape: tuple[int, ...],
        make: Callable[[], NDArray[np.generic]],
    ) -> tuple[ir.ExternalTensor, int]:
        """Stores `make()` under `key` unless it is there, and refers to it.

        Args:
            key: What the bytes are; equal keys must mean equal bytes.
            name: The initialiser's name in the graph.
            shape: Its shape in the graph; the bytes may serve several shapes.
            make: Gives the array; not called when the key is stored already.

        Returns:
            The reference, and how many bytes were written now.
        """
        written = 0
        if key not in self._placed:
            array = np.ascontiguousarray(make())
            align = PAGE_BYTES if array.nbytes >= PAGE_BYTES else SMALL_ALIGN_BYTES
            self._file.write(b"\0" * (-self._file.tell() % align))
            self._placed[key] = (self._file.tell(), array.nbytes, array.dtype)
            self._file.write(array.data)
            written = array.nbytes
        offset, length, dtype = self._placed[key]
        tensor = ir.ExternalTensor(
            location=self.path.name,
            offset=offset,
            length=length,
            dtype=_IR_DTYPES[dtype],
            shape=ir.Shape(shape),
            name=name,
            base_dir=str(self.path.parent),
        )
        return tensor, written
