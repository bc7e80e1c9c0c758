"""Reading the file of weights of a Core ML package, every size checked before it is used.

The format, little-endian: a head of 64 bytes (count of arrays, version 2), then, each on a multiple
of 64 bytes, a record of 64 bytes for every array (sentinel, type, bytes, where the data lies,
padding bits of the last byte) and its data.

Source: the C++ headers of coremltools, mlmodel/src/MILBlob/Blob/StorageFormat.hpp.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lorgnette.errors import BundleError

HEAD_BYTES = RECORD_BYTES = 64
VERSION = 2
SENTINEL = 0xDEADBEEF
_RECORD = struct.Struct("<IIQQQ")


@dataclass(frozen=True)
class StorageType:
    """How numbers of a type lie in the file."""

    code: int
    bits: int
    dtype: np.dtype[np.generic]
    """What they are read as."""
    signed: bool = False


TYPES: dict[str, StorageType] = {
    "float16": StorageType(1, 16, np.dtype("<f2")),
    "float32": StorageType(2, 32, np.dtype("<f4")),
    "uint8": StorageType(3, 8, np.dtype(np.uint8)),
    "int8": StorageType(4, 8, np.dtype(np.int8)),
    "int4": StorageType(8, 4, np.dtype(np.int8), signed=True),
    "uint4": StorageType(11, 4, np.dtype(np.uint8)),
    "uint6": StorageType(13, 6, np.dtype(np.uint8)),
    "int32": StorageType(14, 32, np.dtype("<i4")),
}


class BlobFile:
    """A file of weights, mapped into memory."""

    def __init__(self, path: Path) -> None:
        """Maps the file.

        Raises:
            BundleError: It is not such a file.
        """
        self.path = path
        self._bytes = _map(path)
        if self._bytes.size < HEAD_BYTES:
            raise BundleError("file of weights is cut off", where=path, got=self._bytes.size)
        version = struct.unpack_from("<II", self._bytes.data)[1]
        if version != VERSION:
            raise BundleError(
                "file of weights is of another version", where=path, got=version, wanted=VERSION
            )

    def read(self, offset: int, dtype: str, shape: tuple[int, ...]) -> NDArray[np.generic]:
        """The array whose record stands at an offset; types of less than a byte in a byte each.

        Raises:
            BundleError: There is none, or it is of another type or size.
        """
        kind = TYPES[dtype]
        count = math.prod(shape)
        start, size = self._find(offset, dtype, count)
        raw = self._bytes[start : start + size]
        if kind.bits >= 8:
            return raw.view(kind.dtype).reshape(shape)
        codes = unpack(raw, kind.bits, count)
        if not kind.signed:
            return codes.reshape(shape)
        half = np.int8(1 << (kind.bits - 1))
        return ((codes.astype(np.int8) ^ half) - half).reshape(shape)

    def size(self, offset: int) -> int:
        """Bytes of the array whose record stands at an offset.

        Raises:
            BundleError: There is none.
        """
        return self._record(offset)[1]

    def _record(self, offset: int) -> tuple[int, int, int]:
        """Type, bytes and place of an array."""
        end = self._bytes.size
        if offset % RECORD_BYTES or not HEAD_BYTES <= offset <= end - RECORD_BYTES:
            raise BundleError("a weight lies outside its file", where=self.path, got=offset)
        sentinel, code, size, start, _ = _RECORD.unpack_from(self._bytes.data, offset)
        where = f"{self.path} at {offset}"
        if sentinel != SENTINEL:
            raise BundleError("a weight has no record", where=where, got=hex(sentinel))
        if start % RECORD_BYTES or not offset < start <= end - size:
            raise BundleError("a weight lies outside its file", where=where, got=start)
        return code, size, start

    def _find(self, offset: int, dtype: str, count: int) -> tuple[int, int]:
        kind = TYPES[dtype]
        code, size, start = self._record(offset)
        wanted = -(-count * kind.bits // 8)
        if (code, size) != (kind.code, wanted):
            raise BundleError(
                "a weight is not of the size or type that the program says",
                where=f"{self.path} at {offset}",
                got=f"{size} bytes of type {code}",
                wanted=f"{wanted} bytes of {dtype}",
            )
        return start, size


def unpack(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    """Numbers of less than 8 bits, the first in the lowest bits; they may cross bytes."""
    if bits == 4:
        both = np.empty((packed.size, 2), np.uint8)
        both[:, 0], both[:, 1] = packed & 15, packed >> 4
        return both.reshape(-1)[:count]
    places = np.unpackbits(packed, bitorder="little")[: count * bits].reshape(count, bits)
    weights = (1 << np.arange(bits)).astype(np.uint8)
    found: NDArray[np.uint8] = (places * weights).sum(axis=1, dtype=np.uint8)
    return found


def _map(path: Path) -> NDArray[np.uint8]:
    if path.is_symlink() or not path.is_file():
        raise BundleError("file of weights is missing", where=path)
    if not path.stat().st_size:
        return np.empty(0, np.uint8)
    return np.memmap(path, np.uint8, "r")
