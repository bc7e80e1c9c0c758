"""Weights that torch.save wrote: a zip of one pickle and one record for each storage.

The pickle is a program. It is read by torch's weights-only loader, which never calls what the
file names outside a fixed list; before that it is looked through here, without being run, and
refused for any name that a plain dict of tensors does not need.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorgnette.errors import CheckpointError
from lorgnette.export.formats.weight_file import TensorInfo, check_float

if TYPE_CHECKING:
    import torch

MAX_PICKLE_BYTES = 16 * 2**20
"""That of a model of a thousand tensors is a tenth of a megabyte."""
ZIP_MAGIC = b"PK\x03\x04"
DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
STORAGES = ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
ALLOWED_GLOBALS = frozenset(
    [
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
        *(f"torch {name}Storage" for name in STORAGES),
    ]
)


class TorchFile:
    """One file of torch.save, mapped; nothing is copied until asked.

    Args:
        file: An existing file.

    Raises:
        CheckpointError: It is damaged, of the form before torch 1.6, holds anything but a flat
            dict of tensors, or its pickle names code. Nothing of it was run.
    """

    def __init__(self, file: Path) -> None:
        """Looks through the archive, then loads the dict of mapped tensors."""
        self._file = file
        records = _check_archive(file)
        self._tensors = _load(file)
        for name, tensor in self._tensors.items():
            self._check_view(name, tensor)
        self._check_records(records)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(tuple(tensor.shape), _spell(tensor.dtype), file.name)
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """One tensor as float32, its own copy."""
        import torch

        check_float(name, self.tensors[name].dtype, self._file)
        return (
            self._tensors[name]
            .detach()
            .to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        )

    def _check_view(self, name: str, tensor: torch.Tensor) -> None:
        """Strides of zero let a few bytes claim any size, so a copy could fill the memory."""
        import torch

        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
            raise CheckpointError(f"tensor '{name}' is not a plain tensor", where=self._file)
        claimed, stored = tensor.nbytes, tensor.untyped_storage().nbytes()
        if claimed > stored:
            raise CheckpointError(
                f"tensor '{name}' is larger than its storage",
                where=self._file,
                got=f"{claimed} bytes",
                wanted=f"<= {stored}",
            )

    def _check_records(self, records: list[int]) -> None:
        """Each storage must be one whole record.

        The loader maps a storage at the start of its record with the size that the pickle
        claims, so it could reach over the records behind. In file order the sizes must agree.
        """
        storages = {}
        for tensor in self._tensors.values():
            storage = tensor.untyped_storage()
            if storage.nbytes():
                storages[storage.data_ptr()] = storage.nbytes()
        claimed = [storages[start] for start in sorted(storages)]
        if claimed != records:
            raise CheckpointError(
                "the sizes of the tensors' storages are not those of the records",
                where=self._file,
                got=f"{len(claimed)} storages of {sum(claimed)} bytes",
                wanted=f"{len(records)} of {sum(records)}",
                hint="download it again",
            )


def _spell(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return DTYPES.get(name, name)


def _check_archive(file: Path) -> list[int]:
    """Looks through the archive without running anything; the sizes of its storages in order."""
    with file.open("rb") as opened:
        if opened.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
            raise CheckpointError(
                "weight file is not a zip archive of torch",
                where=file,
                hint="damaged, or of the form before torch 1.6: get it as safetensors, or load it "
                "where you trust it and save it with a newer torch",
            )
    try:
        with zipfile.ZipFile(file) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
            _check_entries(file, entries)
            (code,) = [entry for entry in entries if _inner(entry) == "data.pkl"]
            _check_globals(file, archive.read(code))
            for entry in entries:
                if _inner(entry) == "byteorder" and archive.read(entry) != b"little":
                    raise CheckpointError("weight file is big-endian", where=file)
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError) as error:
        raise _damaged(file, error) from error
    return [
        entry.file_size
        for entry in entries
        if _inner(entry).startswith("data/") and entry.file_size
    ]


def _inner(entry: zipfile.ZipInfo) -> str:
    """The name without the folder that torch.save puts around everything."""
    return entry.filename.partition("/")[2]


def _check_entries(file: Path, entries: list[zipfile.ZipInfo]) -> None:
    names = [_inner(entry) for entry in entries]
    if names.count("data.pkl") != 1 or len(set(names)) != len(names):
        raise CheckpointError(
            "archive is not one that torch.save writes",
            where=file,
            wanted="one data.pkl, and no name twice",
        )
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise CheckpointError(
                f"record '{entry.filename}' is compressed", where=file, hint="torch.save stores"
            )
        if not _inner(entry).startswith("data/") and entry.file_size > MAX_PICKLE_BYTES:
            raise CheckpointError(
                f"record '{entry.filename}' is too large",
                where=file,
                got=f"{entry.file_size} bytes",
                wanted=f"<= {MAX_PICKLE_BYTES}",
            )


def _check_globals(file: Path, code: bytes) -> None:
    """Refuses a pickle that names anything which a dict of tensors does not need."""
    for opcode, argument, _ in pickletools.genops(code):
        if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            named = f"{opcode.name} {argument or ''}"
        elif opcode.name == "GLOBAL" and argument not in ALLOWED_GLOBALS:
            named = str(argument).replace(" ", ".")
        else:
            continue
        raise CheckpointError(
            "weight file holds pickled code",
            where=file,
            got=named,
            wanted="tensors only",
            hint="nothing of it was run; get it as safetensors from a source that you trust",
        )


def _load(file: Path) -> dict[str, torch.Tensor]:
    import torch

    try:
        loaded = torch.load(  # noqa: TID251  (weights only, and looked through before)
            file, map_location="cpu", weights_only=True, mmap=True
        )
    except Exception as error:
        # A damaged pickle can fail anywhere in the loader, with any exception.
        raise _damaged(file, error) from error
    if not isinstance(loaded, dict):
        raise _not_flat(file, type(loaded).__name__)
    for name, value in loaded.items():
        if not isinstance(name, str):
            raise _not_flat(file, f"a key of type {type(name).__name__}")
        if not isinstance(value, torch.Tensor):
            raise _not_flat(file, f"'{name}' of type {type(value).__name__}")
    return dict(loaded)


def _not_flat(file: Path, got: str) -> CheckpointError:
    return CheckpointError(
        "weight file is not a flat dict of tensors", where=file, got=got, wanted="name to tensor"
    )


def _damaged(file: Path, error: Exception) -> CheckpointError:
    told = str(error).strip().splitlines()
    return CheckpointError(
        "weight file is damaged",
        where=file,
        got=told[0][:200] if told else type(error).__name__,
        hint="download it again",
    )
