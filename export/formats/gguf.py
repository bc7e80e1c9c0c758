"""Weights and metadata in one GGUF file, memory-mapped.

The header is parsed here rather than by `gguf.GGUFReader`: that one follows every count that the
file claims, and makes two numpy views for each of a vocabulary's strings (12 s and 0.5 GB for
Qwen2's, against 0.3 s and 50 MB). The package gives the names and sizes of the types and undoes
the quantisation.

Source: the GGUF specification, github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorgnette.errors import CheckpointError, MissingExtraError
from lorgnette.export.formats.weight_file import FLOAT_DTYPES, TensorInfo, check_float

if TYPE_CHECKING:
    import gguf
    import torch

VERSIONS = (2, 3)
MAX_SHORT_ARRAY = 512
"""Longer arrays are read only when asked for: vocabularies have hundreds of thousands."""
MAX_ARRAY = 2**20
MAX_ENTRIES = 2**16
MAX_TENSORS = 2**16
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 2**16
MAX_STRING_BYTES = 2**24
CHUNK = 2**22
"""Elements that are dequantised at a time."""
DEQUANTISED = ("Q8_0",)
INTEGERS = ("I8", "I16", "I32", "I64")
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""Value type to its struct format."""
STRING, ARRAY = 8, 9
Value = str | int | float | bool


@dataclass(frozen=True)
class _Place:
    """Where a tensor's data lies, and in which type."""

    start: int
    size: int
    kind: gguf.GGMLQuantizationType


class GgufFile:
    """One GGUF file, mapped; nothing but the header is read until asked.

    Args:
        file: An existing file.

    Raises:
        CheckpointError: It is damaged, big-endian, of another version, one of several parts, or
            holds a tensor of a type that cannot be read.
        MissingExtraError: The `gguf` package is not installed.
    """

    def __init__(self, file: Path) -> None:
        """Parses the header."""
        try:
            import gguf  # noqa: F401
        except ImportError as error:
            raise MissingExtraError(
                "reading GGUF files needs the gguf package",
                hint="pip install 'lorgnette[export]'",
            ) from error
        self._file = file
        self._map = _map(file)
        self.metadata: dict[str, Value | list[Value]] = {}
        """Scalars and short arrays by key."""
        self.arrays: dict[str, Callable[[], list[Value]]] = {}
        """Every array by key, decoded when called."""
        self.tensors: Mapping[str, TensorInfo] = {}
        self._places: dict[str, _Place] = {}
        cursor = _Cursor(self._map, file)
        tensor_count, entry_count = _read_preamble(cursor)
        cursor.bound(entry_count, MAX_ENTRIES, "metadata entries")
        for _ in range(entry_count):
            self._read_entry(cursor)
        if self.metadata.get("split.count", 1) != 1:
            raise CheckpointError(
                "file is one of several parts",
                where=file,
                got=f"{self.metadata['split.count']} parts",
                hint="merge them with llama-gguf-split",
            )
        cursor.bound(tensor_count, MAX_TENSORS, "tensors")
        self._read_tensors(cursor, tensor_count)

    def read(self, name: str) -> torch.Tensor:
        """One tensor as float32, its own copy.

        Memory: the copy; a quantised tensor is taken apart some rows at a time.
        """
        import gguf
        import numpy as np
        import torch

        info, place = self.tensors[name], self._places[name]
        check_float(name, info.dtype, self._file, *DEQUANTISED)
        count, columns = math.prod(info.shape[:-1]), info.shape[-1] if info.shape else 1
        values = np.empty((count, columns), np.float32)
        stored = np.frombuffer(self._map, np.uint8, place.size, place.start).reshape(count, -1)
        step = max(CHUNK // columns, 1)
        for start in range(0, count, step):
            rows = stored[start : start + step]
            plain = (
                rows.view(np.float64) if info.dtype == "F64" else gguf.dequantize(rows, place.kind)
            )
            values[start : start + step] = plain
        return torch.from_numpy(values.reshape(info.shape))

    def _read_entry(self, cursor: _Cursor) -> None:
        key = cursor.string(MAX_NAME_BYTES)
        if key in self.metadata or key in self.arrays:
            raise CheckpointError(f"key '{key}' is there twice", where=self._file)
        kind = cursor.integer("I")
        if kind != ARRAY:
            self.metadata[key] = cursor.value(kind)
            return
        element, count = cursor.integer("I"), cursor.integer("Q")
        start = cursor.at
        cursor.bound(count, MAX_ARRAY, f"values of '{key}'")
        cursor.skip_array(element, count)

        def decode() -> list[Value]:
            return _Cursor(self._map, self._file, start).array(element, count)

        self.arrays[key] = decode
        if count <= MAX_SHORT_ARRAY:
            self.metadata[key] = decode()

    def _read_tensors(self, cursor: _Cursor, count: int) -> None:
        found = [self._read_tensor(cursor) for _ in range(count)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(
                "alignment is not a power of two", where=self._file, got=alignment
            )
        data = cursor.at + -cursor.at % alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, place in found:
            if name in tensors:
                raise CheckpointError(f"tensor '{name}' is there twice", where=self._file)
            if place.start % alignment:
                raise CheckpointError(f"tensor '{name}' is not aligned", where=self._file)
            end = data + place.start + place.size
            if end > len(self._map):
                raise CheckpointError(
                    f"tensor '{name}' ends behind the end of the file",
                    where=self._file,
                    got=f"byte {end}",
                    wanted=f"<= {len(self._map)}",
                    hint="download it again",
                )
            tensors[name] = TensorInfo(shape, place.kind.name, "")
            self._places[name] = _Place(data + place.start, place.size, place.kind)
        self.tensors = tensors

    def _read_tensor(self, cursor: _Cursor) -> tuple[str, tuple[int, ...], _Place]:
        """Name, shape with the rows first, and the place counted from the start of the data."""
        name = cursor.string(MAX_NAME_BYTES)
        dimensions = cursor.integer("I")
        if dimensions > MAX_DIMENSIONS:
            raise CheckpointError(
                f"tensor '{name}' has too many dimensions",
                where=self._file,
                got=dimensions,
                wanted=f"<= {MAX_DIMENSIONS}",
            )
        shape = tuple(reversed([cursor.integer("Q") for _ in range(dimensions)]))
        kind, block, width = self._type(name, cursor.integer("I"))
        columns = shape[-1] if shape else 1
        if columns % block:
            raise CheckpointError(
                f"rows of tensor '{name}' are not whole blocks of {kind.name}",
                where=self._file,
                got=columns,
                wanted=f"a multiple of {block}",
            )
        size = math.prod(shape) // block * width
        return name, shape, _Place(cursor.integer("Q"), size, kind)

    def _type(self, name: str, number: int) -> tuple[gguf.GGMLQuantizationType, int, int]:
        """The type of a tensor, its elements a block and bytes a block."""
        import gguf

        known = {int(kind): kind for kind in gguf.GGMLQuantizationType}
        kind = known.get(number)
        if kind is None or kind.name not in (*FLOAT_DTYPES, *DEQUANTISED, *INTEGERS):
            raise CheckpointError(
                f"tensor '{name}' is of a type that is not supported",
                where=self._file,
                got=f"type {number}" if kind is None else kind.name,
                wanted=", ".join(FLOAT_DTYPES + DEQUANTISED),
                hint="get the file in one of these",
            )
        block, width = gguf.GGML_QUANT_SIZES[kind]
        return kind, block, width


class _Cursor:
    """Reads values one behind the other, never past the end of the file."""

    def __init__(self, data: mmap.mmap, file: Path, at: int = 0) -> None:
        self._data = data
        self._file = file
        self.at = at

    def integer(self, code: str) -> int:
        """One integer in the struct format of its type."""
        return int(self._scalar(code))

    def string(self, most: int = MAX_STRING_BYTES) -> str:
        """One string of bounded length."""
        length = self.integer("Q")
        self.bound(length, most, "bytes in a string")
        start = self._advance(length)
        try:
            return self._data[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                "a string is not UTF-8", where=self._file, got=error.reason
            ) from error

    def value(self, kind: int) -> Value:
        """One scalar or string."""
        if kind == STRING:
            return self.string()
        if kind not in SCALARS:
            raise CheckpointError("unknown type of a value", where=self._file, got=kind)
        return self._scalar(SCALARS[kind])

    def skip_array(self, kind: int, count: int) -> None:
        """Goes past the elements of an array."""
        if kind == STRING:
            for _ in range(count):
                self._advance(self.integer("Q"))
            return
        if kind not in SCALARS:
            raise CheckpointError(
                "unknown type of an array's values",
                where=self._file,
                got="arrays" if kind == ARRAY else kind,
            )
        self._advance(count * struct.calcsize(SCALARS[kind]))

    def array(self, kind: int, count: int) -> list[Value]:
        """The elements of an array that was skipped before, so its sizes are right."""
        if kind == STRING:
            return [self.string() for _ in range(count)]
        code = f"<{count}{SCALARS[kind]}"
        return list(struct.unpack_from(code, self._data, self._advance(struct.calcsize(code))))

    def bound(self, count: int, most: int, what: str) -> None:
        """Refuses a count that no published file comes near, before anything is made for it."""
        if count > most:
            raise CheckpointError(
                f"file claims too many {what}",
                where=self._file,
                got=count,
                wanted=f"<= {most}",
                hint="download it again",
            )

    def _scalar(self, code: str) -> int | float | bool:
        size = struct.calcsize(f"<{code}")
        value: int | float | bool = struct.unpack_from(f"<{code}", self._data, self._advance(size))[
            0
        ]
        return value

    def _advance(self, size: int) -> int:
        start = self.at
        if start + size > len(self._data):
            raise CheckpointError(
                "file ends within its header", where=self._file, hint="download it again"
            )
        self.at = start + size
        return start


def _map(file: Path) -> mmap.mmap:
    try:
        with file.open("rb") as opened:
            return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise CheckpointError(
            "weight file cannot be read", where=file, got=error, hint="download it again"
        ) from error


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    """Checks magic and version; the counts of tensors and of metadata entries."""
    file = cursor._file
    magic = struct.pack("<I", cursor.integer("I"))
    if magic != b"GGUF":
        raise CheckpointError("file is not GGUF", where=file, got=repr(magic), wanted="b'GGUF'")
    version = cursor.integer("I")
    if version & 0xFFFF == 0:
        raise CheckpointError("file is big-endian", where=file, wanted="little-endian GGUF")
    if version not in VERSIONS:
        raise CheckpointError(
            "GGUF version is not supported", where=file, got=version, wanted="2 or 3"
        )
    return cursor.integer("Q"), cursor.integer("Q")
