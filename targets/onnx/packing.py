"""Codes and scales as arrays of bytes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lorgnette.errors import ConfigError

HIGH_BIT = np.uint8(8)
"""Of int4 it means -8: flipping it in a code of 4 bits subtracts 8."""


def pack_codes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes to bytes: the first column in the lowest bits, each row whole bytes.

    Shapes: uint8 `[rows, columns]` to `[rows, ceil(columns * bits / 8)]`; 2, 4 or 8 bits.
    """
    a_byte = 8 // bits
    missing = -codes.shape[1] % a_byte
    filled = np.pad(codes, ((0, 0), (0, missing))) if missing else codes
    packed: NDArray[np.uint8] = filled[:, 0::a_byte].copy()
    for place in range(1, a_byte):
        packed |= filled[:, place::a_byte] << np.uint8(bits * place)
    return packed


def read_as(value: ir.Value, dtype: ir.DataType, shape: tuple[int, ...]) -> None:
    """Makes a stored array of bytes one of two numbers a byte."""
    bytes_ = value.const_value
    if isinstance(bytes_, ir.ExternalTensor) and bytes_.dtype != dtype:
        value.const_value = ir.ExternalTensor(
            location=bytes_.location,
            offset=bytes_.offset,
            length=bytes_.length,
            dtype=dtype,
            shape=ir.Shape(shape),
            name=bytes_.name,
            base_dir=bytes_.base_dir,
        )
        value.shape, value.type = ir.Shape(shape), ir.TensorType(dtype)


def as_halves(scales: NDArray[np.float32]) -> NDArray[np.float16]:
    """Scales of 16 bits.

    Raises:
        ConfigError: One is no float16 number.
    """
    half = scales.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), scales):
        raise ConfigError(
            "scales of a matrix are no float16 numbers",
            hint="the method that made them must round them before it chooses codes",
        )
    return half
