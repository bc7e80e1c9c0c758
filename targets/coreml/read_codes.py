"""Codes and scales of a bundle's matrices, read back from its packages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lorgnette.errors import BundleError
from lorgnette.targets.coreml.package import (
    Constant,
    FunctionCode,
    Operation,
    Package,
    ValueType,
    read_package,
)
from lorgnette.targets.target import StoredMatrix

if TYPE_CHECKING:
    from lorgnette.manifest import Manifest

Array = NDArray[np.generic]

SCALES = "__scales_"


def read_codes(folder: Path, manifest: Manifest) -> Iterator[StoredMatrix]:
    """Every matrix that is stored as integers.

    Raises:
        BundleError: A package is damaged.
    """
    for component in manifest.components:
        package = read_package(folder / component.graph)
        seen: set[str] = set()
        for code in package.functions.values():
            for operation in code.operations:
                if not operation.type.startswith("constexpr_"):
                    continue
                name = operation.outputs[0][0]
                if name not in seen:
                    seen.add(name)
                    yield _multiplied(component.name, package, code, operation)
            yield from _gathered(component.name, package, code, seen)


def parameter_name(name: str) -> str:
    """A parameter's name from MIL's."""
    return name.replace("__", ".")


def _multiplied(
    component: str, package: Package, code: FunctionCode, operation: Operation
) -> StoredMatrix:
    """A matrix that inputs are multiplied by: signed codes, those with zero points, a palette."""
    ((name, type_),) = operation.outputs
    rows, columns = type_.shape[0], _columns(code, name)
    if operation.type == "constexpr_lut_to_dense":
        indices = _constant(operation, "indices")
        bits = int(indices.type.dtype.removeprefix("uint"))
        codes: Array = package.array(indices)
        scales: Array = np.ones((rows, 1), np.float32)
    else:
        data, scale = _constant(operation, "data"), _constant(operation, "scale")
        bits = int(data.type.dtype.removeprefix("u").removeprefix("int"))
        codes, scales = package.array(data), package.array(scale)
        if data.type.dtype.startswith("int"):
            codes = codes.astype(np.int16) + (1 << (bits - 1))
        scales = np.broadcast_to(scales, (rows, scales.shape[1]))
    return StoredMatrix(
        component=component,
        name=parameter_name(name),
        codes=codes.astype(np.uint8)[:, :columns],
        scales=scales.astype(np.float32),
        bits=bits,
    )


def _columns(code: FunctionCode, matrix: str) -> int:
    """Columns that mean something: where codes fill up the last group, inputs are padded."""
    made: dict[str, Operation] = {n: o for o in code.operations for n, _ in o.outputs}
    types: dict[str, ValueType] = {**code.inputs}
    types |= {name: type_ for each in code.operations for name, type_ in each.outputs}
    for each in code.operations:
        if each.type == "linear" and each.inputs["weight"][0] == matrix:
            x = str(each.inputs["x"][0])
            while x in made and made[x].type == "pad":
                x = str(made[x].inputs["x"][0])
            return types[x].shape[-1]
    raise BundleError("a matrix is multiplied with nothing", where=code.name, got=matrix)


def _gathered(
    component: str, package: Package, code: FunctionCode, seen: set[str]
) -> Iterator[StoredMatrix]:
    """Tables that rows are looked up in: bytes, or two codes in each."""
    arrays = {
        each.outputs[0][0]: _constant(each, "val")
        for each in code.operations
        if each.type == "const"
    }
    for name, constant in arrays.items():
        base, _, part = name.rpartition("__")
        if base in seen or part not in ("packed", "codes"):
            continue
        seen.add(base)
        (width,) = {type_.shape[-1] for type_ in code.outputs.values()}
        codes = package.array(constant).astype(np.uint8)
        bits = 4 if part == "packed" else 8
        if bits == 4:
            codes = np.stack([codes & 15, codes >> 4], axis=2).reshape(len(codes), -1)
        (scales,) = (package.array(c) for n, c in arrays.items() if n.startswith(base + SCALES))
        yield StoredMatrix(
            component=component,
            name=parameter_name(base),
            codes=codes[:, :width],
            scales=scales.astype(np.float32),
            bits=bits,
        )


def _constant(operation: Operation, name: str) -> Constant:
    (found,) = operation.inputs[name]
    if not isinstance(found, Constant):
        raise TypeError(f"{name} of {operation.type} is computed")
    return found
