"""Stored matrices as constants of a Core AI program: codes packed as they are, scales beside them.

A constant is made when the converter first asks for it and kept by the program, which holds equal
constants of all its functions once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from coreai._compiler.ir import (
    Attribute,
    DenseResourceElementsAttr,
    F16Type,
    F32Type,
    IntegerType,
    Location,
    RankedTensorType,
    Type,
    Value,
)
from numpy.typing import NDArray

from lorgnette.quantize.scheme import QuantScheme, QuantTensor
from lorgnette.quantize.store import QuantizedSource
from lorgnette.targets.coreai.library import core

FOLDED_ELEMENTS = 262144
"""The converter turns a cast of a smaller constant into a constant of the wider type, so that
float16 saves nothing there; observed in coreai-core 1.0.0b3."""

Bytes = NDArray[np.uint8]
Array = NDArray[np.generic]


def pack(values: Bytes, bits: int) -> Bytes:
    """Numbers of `bits` bits one behind the other, the first in the lowest bits of a byte."""
    if bits == 8:
        return np.ascontiguousarray(values)
    flat = values.reshape(-1)
    if 8 % bits:
        spread = np.unpackbits(flat[:, None], axis=1, count=bits, bitorder="little")
        return np.packbits(spread.reshape(-1), bitorder="little")
    per_byte = 8 // bits
    padded = np.pad(flat, (0, -len(flat) % per_byte)).reshape(-1, per_byte)
    packed = np.zeros(len(padded), np.uint8)
    for place in range(per_byte):
        packed |= padded[:, place] << np.uint8(place * bits)
    return packed


def stored_codes(made: QuantTensor) -> Bytes:
    """Codes as bit patterns of the type that holds them.

    Symmetric codes are stored as signed numbers: 2 ** (bits - 1) less, in two's complement, which
    is the topmost bit turned over.
    """
    scheme = made.scheme
    if not scheme.symmetric or scheme.palette:
        return made.codes
    return made.codes ^ np.uint8(1 << (scheme.bits - 1))


def integer_type(scheme: QuantScheme) -> IntegerType:
    """The type of a scheme's codes: signed where they are symmetric."""
    signed = scheme.symmetric and not scheme.palette
    make = IntegerType.get_signed if signed else IntegerType.get_unsigned
    # The bits of a signed 8-bit number are stored as a byte like all others.
    return make(scheme.bits)


class StoredAs(NamedTuple):
    """Where a matrix of codes is: constants are called `name:codes`, `name:scales` and so on."""

    name: str
    columns: int
    """Of the matrix: its codes may have more."""


class Constants:
    """The constants of one asset."""

    def __init__(self, sources: Mapping[str, QuantizedSource]) -> None:
        """Reads matrices of these components, named `component/parameter`."""
        self._sources = sources
        self._made: dict[tuple[str, str], Attribute] = {}
        self._first: dict[str, str] = {}
        self._stored: dict[str, StoredAs] = {}
        self.weight_bytes: dict[str, dict[str, int]] = {name: {} for name in sources}
        self.exceptions: dict[str, set[str]] = {name: set() for name in sources}

    def matrix(self, key: str, location: Location) -> Value:
        """A matrix as float32 `[rows, padded columns]`, as its scheme stores it."""
        source, name = self._find(key)
        scheme = source.rule(name).scheme
        if not scheme.is_integer:
            return _as_float32(self._values(key, location))
        codes = self.part(key, "codes", location)
        if scheme.palette:
            axis = core.constant(np.array(0, np.int16), loc=location)
            return core.lut_to_dense(codes, self.part(key, "palette", location), axis)
        scales = _as_float32(self.part(key, "scales", location))
        shape = tuple(tensor_type(scales).shape)
        zero_points = (
            _splat(shape, tensor_type(codes).element_type, location)
            if scheme.symmetric
            else self.part(key, "zero_points", location)
        )
        offset = core.constant(np.zeros(shape, np.float32), loc=location)
        return core.blockwise_shift_scale(codes, scales, zero_points, offset)

    def part(self, key: str, part: str, location: Location) -> Value:
        """The codes, scales, zero points or palette of a matrix, or its float values."""
        if part == "values":
            return self._values(key, location)
        source, name = self._find(key)
        scheme = source.rule(name).scheme

        def make() -> tuple[Type, tuple[int, ...], Array]:
            made = source.codes(name)
            groups = made.scales.shape
            if part == "codes":
                packed = pack(stored_codes(made), scheme.bits)
                return integer_type(scheme), made.codes.shape, packed
            if part == "zero_points":
                return integer_type(scheme), groups, pack(made.zero_points, scheme.bits)
            if part == "palette":
                if made.tables is None:
                    raise ValueError(f"{key} has no palette")
                tables = made.tables.reshape(len(made.tables), 1, -1, 1)
                return F32Type.get(), tables.shape, tables
            narrow = scheme.scale_bits == 16 and made.scales.size >= FOLDED_ELEMENTS
            kind, dtype = (F16Type, np.float16) if narrow else (F32Type, np.float32)
            if scheme.scale_bits == 16 and not narrow:
                self.exceptions[source.component].add(
                    "scales of 16 bits are stored as float32, the same numbers, but those of "
                    f"matrices with {FOLDED_ELEMENTS} groups or more"
                )
            return kind.get(), groups, made.scales.astype(dtype)

        return self._constant(key, part, scheme.form, make, location)

    def _values(self, key: str, location: Location) -> Value:
        source, name = self._find(key)
        scheme = source.rule(name).scheme

        def make() -> tuple[Type, tuple[int, ...], Array]:
            values = source.unrounded(name)
            if scheme.bits == 32:
                return F32Type.get(), values.shape, values
            half = values.astype(np.float16)
            if half.size >= FOLDED_ELEMENTS:
                return F16Type.get(), half.shape, half
            self.exceptions[source.component].add(
                "float16 matrices are stored as float32, the same numbers, where they have less "
                f"than {FOLDED_ELEMENTS} elements"
            )
            return F32Type.get(), half.shape, half.astype(np.float32)

        return self._constant(key, "values", scheme.form, make, location)

    def _constant(
        self,
        key: str,
        part: str,
        form: str,
        make: Callable[[], tuple[Type, tuple[int, ...], Array]],
        location: Location,
    ) -> Value:
        source, name = self._find(key)
        same = f"{source.storage_key(name)} {form}"
        place = (same, part)
        first = self._first.setdefault(same, key)
        if part == "codes":
            self._stored[key] = StoredAs(first, source.shapes[name][1])
        if place not in self._made:
            kind, shape, array = make()
            name = f"{self._first[place[0]]}:{part}"
            self._made[place] = resource(name, kind, shape, array)
            sizes = self.weight_bytes[source.component]
            sizes[form] = sizes.get(form, 0) + array.nbytes
        return constant(self._made[place])

    def stored(self, component: str) -> dict[str, StoredAs]:
        """Where the codes of a component's matrices are, by their own names."""
        mine = f"{component}/"
        return {
            key.removeprefix(mine): place
            for key, place in sorted(self._stored.items())
            if key.startswith(mine)
        }

    def _find(self, key: str) -> tuple[QuantizedSource, str]:
        component, _, name = key.partition("/")
        return self._sources[component], name


def resource(name: str, kind: Type, shape: tuple[int, ...], array: Array) -> Attribute:
    """Bytes as a constant's value, under a name of ours.

    The library itself names them by a hash that differs from run to run. The program refers to the
    array, which is not copied.
    """
    held = RankedTensorType.get(list(shape), kind)
    flat = np.ascontiguousarray(array).reshape(-1)
    return DenseResourceElementsAttr.get_from_buffer(flat.data, name, held)


def constant(value: Attribute) -> Value:
    """A constant of that value."""
    result: Value = core.ConstantOp(value=value).result  # type: ignore[no-untyped-call]
    return result


def tensor_type(value: Value) -> RankedTensorType:
    """The type of a value that is a tensor."""
    return RankedTensorType(value.type)


def _as_float32(value: Value) -> Value:
    return (
        core.cast(value, np.float32)
        if F16Type.isinstance(tensor_type(value).element_type)
        else value
    )


def _splat(shape: tuple[int, ...], kind: Type, location: Location) -> Value:
    """A constant of zeros, which costs no bytes."""
    return core.constant(np.zeros(shape, np.int8), dtype=kind, loc=location)
