"""GGUF files changed in one place, written with the package's own writer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Kind = gguf.GGUFValueType
Quantisation = gguf.GGMLQuantizationType
Stored = tuple[str, Any, Quantisation]
"""A tensor: name, data as stored, type."""


def edit_gguf(
    file: Path,
    keys: Mapping[str, Any] | None = None,
    tensor: Callable[[Stored], Stored | None] = lambda stored: stored,
    out: Path | None = None,
) -> Path:
    """Writes a file again with other keys or tensors.

    Args:
        file: The file.
        keys: What keys are instead, each of the type that fits the value; None takes one away.
        tensor: What a tensor is instead; None takes it away.
        out: Where to write; None takes the place of the file.
    """
    changed = dict(keys or {})
    reader = gguf.GGUFReader(file)
    fields = {n: f for n, f in reader.fields.items() if not n.startswith("GGUF.")}
    new = file.with_suffix(".new")
    writer = gguf.GGUFWriter(new, "")
    writer.kv_data[0].clear()  # it puts an architecture down itself, and always a string
    for name, field in fields.items():
        if name not in changed:
            sub = field.types[-1] if field.types[0] == Kind.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub)
    for name, value in changed.items():
        if value is not None:
            writer.add_key_value(name, value, kind_of(value))
    for found in reader.tensors:
        stored = tensor((found.name, found.data, found.tensor_type))
        if stored is not None:
            name, data, kind = stored
            writer.add_tensor(name, np.array(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return new.replace(file if out is None else out)


def kind_of(value: Any) -> gguf.GGUFValueType:
    """The type that holds a value."""
    if isinstance(value, bool):
        return Kind.BOOL
    if isinstance(value, int):
        return Kind.UINT64 if value >= 2**63 else Kind.INT64
    if isinstance(value, float):
        return Kind.FLOAT64
    return Kind.STRING if isinstance(value, str) else Kind.ARRAY


def requantised(name: str, kind: Quantisation) -> Callable[[Stored], Stored]:
    """Stores one tensor in another type."""

    def change(stored: Stored) -> Stored:
        if stored[0] != name:
            return stored
        values = gguf.dequantize(stored[1], stored[2])
        return name, gguf.quantize(values, kind), kind

    return change


def without(name: str) -> Callable[[Stored], Stored | None]:
    """Takes one tensor away."""
    return lambda stored: None if stored[0] == name else stored


def renamed(old: str, new: str) -> Callable[[Stored], Stored]:
    """Gives one tensor another name."""
    return lambda stored: (new, *stored[1:]) if stored[0] == old else stored


def narrowed(name: str) -> Callable[[Stored], Stored]:
    """Takes the last row of one tensor away."""
    return lambda stored: (name, stored[1][:-1], stored[2]) if stored[0] == name else stored
