"""A checkpoint as published: a directory of JSON files and weights, or a GGUF file."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lorgnette.errors import CheckpointError
from lorgnette.export.formats.weight_file import TensorInfo, TensorSource

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "TensorInfo", "combine", "open_files", "read_json"]

MAX_JSON_BYTES = 64 * 2**20
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
TORCH_INDEX_NAME = "pytorch_model.bin.index.json"
TORCH_SINGLE_NAME = "pytorch_model.bin"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Weight files stay memory-mapped; nothing is copied until asked."""

    path: Path
    """The directory, or the GGUF file."""
    config: Mapping[str, Any]
    """config.json; of a GGUF file its metadata, without long arrays."""
    tensors: Mapping[str, TensorInfo]
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Small files that stand in for ones of the directory, name to contents."""
    _sources: Mapping[str, tuple[TensorSource, str]] = field(default_factory=dict, repr=False)
    """Tensor name to where it is read, and its name there."""
    _arrays: Mapping[str, Callable[[], Sequence[Any]]] = field(default_factory=dict, repr=False)

    def place(self, name: str) -> Path:
        """What an error calls a small file: the file that it was read out of, where that is one."""
        return self.path if self.path.is_file() else self.path / name

    def data(self, name: str) -> bytes | None:
        """The bytes of a small file, None where it does not exist."""
        if name in self.files:
            return self.files[name]
        file = self.path / name
        return _bounded(file) if file.is_file() else None

    def json(self, name: str) -> dict[str, Any] | None:
        """The object of a JSON file, None where it does not exist."""
        content = self.data(name)
        return None if content is None else _parse_json(content, self.path / name)

    def text(self, name: str) -> str | None:
        """The contents of a text file, None where it does not exist."""
        content = self.data(name)
        if content is None:
            return None
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                "file is not UTF-8", where=self.path / name, got=error.reason
            ) from error

    def array(self, key: str) -> Sequence[Any] | None:
        """An array of a GGUF file's metadata, however long, None where there is none."""
        return self._arrays[key]() if key in self._arrays else None

    def read(self, name: str) -> torch.Tensor:
        """One tensor as float32, its own copy.

        Raises:
            CheckpointError: It holds integers.
        """
        source, there = self._sources[name]
        return source.read(there)


def open_files(path: str | Path) -> Checkpoint:
    """Opens a checkpoint and checks everything that the headers tell.

    Args:
        path: A directory with `config.json` and weights in one file or in indexed shards, as
            safetensors or, where there are none, as torch.save wrote them; or one `.gguf` file.

    Raises:
        CheckpointError: The directory, a file of it or a shard is missing, damaged or hostile.
    """
    root = Path(path)
    if root.suffix.lower() == ".gguf" and not root.is_dir():
        return _open_gguf(root)
    if not root.is_dir():
        raise CheckpointError(
            "checkpoint is not a directory",
            where=root,
            hint="give the folder of config.json, or a .gguf file",
        )
    config = read_json(root / "config.json")
    index_name, index, shards = _find_shards(root)
    tensors: dict[str, TensorInfo] = {}
    sources: dict[str, tuple[TensorSource, str]] = {}
    for shard in shards:
        source = _open_shard(root, shard)
        for name, info in source.tensors.items():
            if name in tensors:
                raise CheckpointError(f"tensor '{name}' is in two shards", where=root / shard)
            tensors[name], sources[name] = info, (source, name)
    _check_not_empty(root, tensors)
    if index is not None:
        _check_index(root / index_name, index, tensors)
    return Checkpoint(root, MappingProxyType(config), MappingProxyType(tensors), _sources=sources)


def combine(
    base: Checkpoint,
    tensors: Mapping[str, tuple[Checkpoint, str]],
    *,
    config: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Checkpoint:
    """A checkpoint under other names, from one checkpoint or several.

    Args:
        base: Where everything comes from that is not given.
        tensors: New name to the checkpoint that holds the tensor, and its name there.
        config: What stands in for config.json.
        files: Small files that are found before those of `base`.

    Raises:
        CheckpointError: A tensor is missing.
    """
    infos: dict[str, TensorInfo] = {}
    for name, (source, there) in tensors.items():
        info = source.tensors.get(there)
        if info is None:
            raise CheckpointError(f"tensor '{there}' is missing", where=source.path)
        if source is not base:
            # Joined to the path of `base`, an absolute one stands for itself.
            info = dataclasses.replace(info, shard=str((source.path / info.shard).absolute()))
        infos[name] = info
    return Checkpoint(
        base.path,
        base.config if config is None else MappingProxyType(dict(config)),
        MappingProxyType(infos),
        MappingProxyType({**base.files, **(files or {})}),
        dict(tensors),
        base._arrays,
    )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size."""
    if not file.is_file():
        raise CheckpointError("file is missing", where=file)
    return _parse_json(_bounded(file), file)


def _parse_json(content: bytes, where: Path) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:  # ValueError: syntax, encoding, endless numbers
        raise CheckpointError("file is not valid JSON", where=where, got=error) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            "file does not hold a JSON object", where=where, got=type(value).__name__
        )
    return value


def _bounded(file: Path) -> bytes:
    size = file.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(
            "file is too large", where=file, got=f"{size} bytes", wanted=f"<= {MAX_JSON_BYTES}"
        )
    return file.read_bytes()


def _open_gguf(file: Path) -> Checkpoint:
    from lorgnette.export.formats.gguf import GgufFile

    if not file.is_file():
        raise CheckpointError("file is missing", where=file)
    opened = GgufFile(file)
    _check_not_empty(file, opened.tensors)
    return Checkpoint(
        file,
        MappingProxyType(opened.metadata),
        MappingProxyType(opened.tensors),
        _sources={name: (opened, name) for name in opened.tensors},
        _arrays=opened.arrays,
    )


def _find_shards(root: Path) -> tuple[str, dict[str, str] | None, list[str]]:
    """The index file, tensor name to shard (None where one file holds all), and the shards."""
    for index_name, single, suffix in (
        (INDEX_NAME, SINGLE_NAME, "safetensors"),
        (TORCH_INDEX_NAME, TORCH_SINGLE_NAME, "bin"),
    ):
        if (root / index_name).is_file():
            index = _shard_index(root / index_name, suffix)
            return index_name, index, sorted(set(index.values()))
        if (root / single).is_file():
            return index_name, None, [single]
    raise CheckpointError(
        "weight file is missing",
        where=root / SINGLE_NAME,
        hint="safetensors are read, or else pytorch_model.bin, each in one file or with its index",
    )


def _shard_index(file: Path, suffix: str) -> dict[str, str]:
    """Tensor name to shard file."""
    index = read_json(file).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError("index has no weight_map", where=file)
    for name, shard in index.items():
        if not isinstance(shard, str) or not re.fullmatch(rf"[\w.-]+\.{suffix}", shard):
            raise CheckpointError(
                f"shard of '{name}' is not the name of a {suffix} file beside the index",
                where=file,
                got=repr(shard),
            )
    return index


def _open_shard(root: Path, name: str) -> TensorSource:
    file = root / name
    if not file.is_file():
        raise CheckpointError("weight file is missing", where=file, hint="download it again")
    if file.suffix == ".bin":
        from lorgnette.export.formats.torch_bin import TorchFile

        return TorchFile(file)
    from lorgnette.export.formats.safetensors import SafetensorsFile

    return SafetensorsFile(file)


def _check_not_empty(root: Path, tensors: Mapping[str, TensorInfo]) -> None:
    for name, info in tensors.items():
        if math.prod(info.shape) == 0:
            raise CheckpointError(f"tensor '{name}' is empty", where=root / info.shard)


def _check_index(file: Path, index: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    for name, info in tensors.items():
        if index.get(name) != info.shard:
            raise CheckpointError(
                f"tensor '{name}' is not where the index says",
                where=file,
                got=info.shard,
                wanted=index.get(name, "no such tensor"),
            )
    for name, shard in index.items():
        if name not in tensors:
            raise CheckpointError(
                f"tensor '{name}' of the index is missing", where=file.parent / shard
            )
