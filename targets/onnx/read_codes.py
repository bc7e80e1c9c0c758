"""Codes and scales of a bundle's matrices, read back from its graphs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lorgnette.errors import BundleError
from lorgnette.manifest import Manifest
from lorgnette.targets.onnx.integer_matmul import MIDDLE
from lorgnette.targets.onnx.packing import HIGH_BIT
from lorgnette.targets.target import StoredMatrix

Codes = NDArray[np.uint8]
Scales = NDArray[np.float32]

CODES = re.compile(r"(.+\.int([2348])[^.]*)\.(codes|columns)")
"""Initialisers of codes: a parameter, its form, and whether rows or columns lie together."""


def read_codes(folder: Path, manifest: Manifest) -> Iterator[StoredMatrix]:
    """Every matrix that is stored as integers, one after the other.

    Args:
        folder: The bundle.
        manifest: Its manifest.

    Raises:
        BundleError: Codes that nothing is multiplied with.
    """
    for component in manifest.components:
        values = ir.load(folder / component.graph).graph.initializers
        for stored, value in values.items():
            found = CODES.fullmatch(stored)
            if found is None:
                continue
            name, bits = found[1], int(found[2])
            by_column = found[3] == "columns"
            codes = _by_column(value) if by_column else _by_row(value, bits)
            yield StoredMatrix(
                component=component.name,
                name=name.rpartition(".")[0],
                codes=codes[:, : _columns(value, codes.shape[1])],
                scales=_scales(values, name, by_column),
                bits=bits,
            )


def _by_row(value: ir.Value, bits: int) -> Codes:
    """Codes that are packed row by row, the first in the lowest bits."""
    packed = _array(value).astype(np.uint8)
    rows = packed.reshape(len(packed), -1, 1)
    places = np.arange(0, 8, bits, dtype=np.uint8)
    codes: Codes = (rows >> places) & np.uint8((1 << bits) - 1)
    return codes.reshape(len(packed), -1)


def _by_column(value: ir.Value) -> Codes:
    """Codes that lie column by column; signed ones are less the one that means zero."""
    codes = _array(value).astype(np.int16)
    if value.dtype == ir.DataType.INT4:
        codes += HIGH_BIT
    elif value.dtype == ir.DataType.INT8:
        codes += MIDDLE
    return codes.astype(np.uint8).T


def _scales(values: Mapping[str, ir.Value], name: str, by_column: bool) -> Scales:
    """Scales `[rows, groups]`: floats, or whole multiples of a number for each row."""
    steps = f"{name}.column_steps" if by_column else f"{name}.scales"
    if steps not in values:  # one scale a row
        return _array(values[f"{name}.scales"]).astype(np.float32).reshape(-1, 1)
    scales = _array(values[steps]).astype(np.float32)
    scales = scales.T if by_column else scales
    if f"{name}.rows" in values:
        scales = scales * _array(values[f"{name}.rows"]).astype(np.float32).reshape(-1, 1)
    return scales


def _columns(value: ir.Value, stored: int) -> int:
    """Columns that mean something; codes fill up the last group.

    Raises:
        BundleError: Nothing is made of the codes.
    """
    users = [use.node for use in value.uses()]
    if not users:
        raise BundleError("a matrix is multiplied with nothing", got=value.name)
    if users[0].op_type == "MatMulNBits":
        return users[0].attributes["K"].as_int()
    if users[0].op_type == "DequantizeLinear":
        after = [use.node for use in users[0].outputs[0].uses()]
        if after and after[0].op_type == "Slice":
            return int(_array(after[0].inputs[2]).item())
    return stored


def _array(value: ir.Value | None) -> NDArray[np.generic]:
    if value is None or value.const_value is None:
        raise BundleError("a constant is missing", got=value)
    return value.const_value.numpy()
