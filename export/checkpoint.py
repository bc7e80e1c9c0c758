"""A checkpoint directory as published: JSON files and safetensors, read tensor by tensor."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lorgnette.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from safetensors import safe_open as SafeOpen

MAX_JSON_BYTES = 64 * 2**20
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
FLOAT_DTYPES = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, known without reading it."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors spells it: `BF16`, `F16`, `F32`."""
    shard: str


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint directory. Shards stay memory-mapped; nothing is copied until asked."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    _shards: Mapping[str, SafeOpen] = field(repr=False)

    def json(self, name: str) -> dict[str, Any] | None:
        """Reads a JSON file of the directory, None where it does not exist."""
        file = self.path / name
        return read_json(file) if file.is_file() else None

    def text(self, name: str) -> str | None:
        """Reads a text file of the directory, None where it does not exist."""
        file = self.path / name
        if not file.is_file():
            return None
        try:
            return _bounded(file).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError("file is not UTF-8", where=file, got=error.reason) from error

    def read(self, name: str) -> torch.Tensor:
        """One tensor as float32, its own copy."""
        import torch

        info = self.tensors[name]
        tensor: torch.Tensor = self._shards[info.shard].get_tensor(name)  # type: ignore[no-untyped-call]
        return tensor.to(torch.float32, copy=True)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a checkpoint directory and checks everything that the headers tell.

    Args:
        path: A directory with `config.json` and safetensors, in one file or in indexed shards.

    Raises:
        CheckpointError: The directory, a file of it or a shard is missing, damaged or hostile.
    """
    root = Path(path)
    if not root.is_dir():
        raise CheckpointError(
            "checkpoint is not a directory", where=root, hint="give the folder of config.json"
        )
    config = read_json(root / "config.json")
    index = _shard_index(root)
    shards: dict[str, Any] = {}
    tensors: dict[str, TensorInfo] = {}
    for name in sorted(set(index.values()) if index is not None else {SINGLE_NAME}):
        shards[name] = _open_shard(root, name)
        for key in shards[name].keys():  # noqa: SIM118  (not a dict)
            part = shards[name].get_slice(key)
            info = TensorInfo(tuple(part.get_shape()), str(part.get_dtype()), name)
            if key in tensors:
                raise CheckpointError(f"tensor '{key}' is in two shards", where=root / name)
            if info.dtype not in FLOAT_DTYPES:
                raise CheckpointError(
                    f"tensor '{key}' is not a float tensor",
                    where=root / name,
                    got=info.dtype,
                    wanted=", ".join(FLOAT_DTYPES),
                )
            tensors[key] = info
    _check_index(root, index, tensors)
    return Checkpoint(root, MappingProxyType(config), MappingProxyType(tensors), shards)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size."""
    if not file.is_file():
        raise CheckpointError("file is missing", where=file)
    try:
        value = json.loads(_bounded(file))
    except (ValueError, RecursionError) as error:  # ValueError: syntax, encoding, endless numbers
        raise CheckpointError("file is not valid JSON", where=file, got=error) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            "file does not hold a JSON object", where=file, got=type(value).__name__
        )
    return value


def _bounded(file: Path) -> bytes:
    size = file.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(
            "file is too large", where=file, got=f"{size} bytes", wanted=f"<= {MAX_JSON_BYTES}"
        )
    return file.read_bytes()


def _shard_index(root: Path) -> dict[str, str] | None:
    """Tensor name to shard file, or None where one file holds all."""
    file = root / INDEX_NAME
    if not file.is_file():
        return None
    index = read_json(file).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError("index has no weight_map", where=file)
    for name, shard in index.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise CheckpointError(
                f"shard of '{name}' is not the name of a safetensors file beside the index",
                where=file,
                got=repr(shard),
            )
    return index


def _open_shard(root: Path, name: str) -> SafeOpen:
    from safetensors import SafetensorError, safe_open

    file = root / name
    if not file.is_file():
        hint = "download it again" if name != SINGLE_NAME else "only safetensors are read"
        raise CheckpointError("weight file is missing", where=file, hint=hint)
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            "weight file is damaged", where=file, got=error, hint="download it again"
        ) from error


def _check_index(
    root: Path, index: Mapping[str, str] | None, tensors: Mapping[str, TensorInfo]
) -> None:
    for name, info in tensors.items():
        if math.prod(info.shape) == 0:
            raise CheckpointError(f"tensor '{name}' is empty", where=root / info.shard)
        if index is not None and index.get(name) != info.shard:
            raise CheckpointError(
                f"tensor '{name}' is not where the index says",
                where=root / INDEX_NAME,
                got=info.shard,
                wanted=index.get(name, "no such tensor"),
            )
    for name, shard in (index or {}).items():
        if name not in tensors:
            raise CheckpointError(f"tensor '{name}' of the index is missing", where=root / shard)
