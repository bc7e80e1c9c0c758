"""Hostile files of torch.save: nothing in them is run, and no size that they claim is believed."""

from __future__ import annotations

import collections
import io
import pickle
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lorgnette.export.checkpoint import open_files
from tests.torch_files import SINGLE, TENSORS, refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with a config and no weights."""
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def save_pickle(file: Path, value: object, storages: Mapping[str, bytes]) -> None:
    """An archive with a pickle of our making, as only an attacker writes one."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: object) -> object:
            return item.saved if isinstance(item, Storage) else None

    code = io.BytesIO()
    Pickler(code, protocol=2).dump(value)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/data.pkl", code.getvalue())
        archive.writestr("model/byteorder", b"little")
        for key, content in storages.items():
            archive.writestr(f"model/data/{key}", content)
        archive.writestr("model/version", b"3\n")


class Storage:
    """What a pickle says about a storage."""

    def __init__(self, key: str, numel: int, kind: Any = torch.FloatStorage) -> None:
        self.saved = ("storage", kind, key, "cpu", numel)


class Call:
    """Pickles as a call of anything with any arguments."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def view(storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Call:
    """Pickles as a tensor."""
    rebuild = torch._utils._rebuild_tensor_v2
    return Call(rebuild, storage, offset, size, stride, False, collections.OrderedDict())


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


class System:
    """Unpickled, it runs a command."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        import os

        return os.system, (f"touch {self.target}",)


class Evaluate:
    """Unpickled, it evaluates Python."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.target)!r}, 'w')",)


ATTACKS = pytest.mark.parametrize(
    ("attack", "named"),
    [(Touch, "pathlib.Path.touch"), (System, "posix.system"), (Evaluate, "__builtin__.eval")],
)


@ATTACKS
def test_pickled_code_in_an_archive_is_named_and_not_run(
    folder: Path, attack: Any, named: str
) -> None:
    target = folder / "pwned"
    torch.save(TENSORS | {"extra": attack(target)}, folder / SINGLE)
    told = named if attack is not Touch else "__builtin__.getattr"  # how protocol 2 spells it
    refused(folder, "holds pickled code", told, "nothing of it was run", SINGLE)
    assert not target.exists()
    torch.load(folder / SINGLE, weights_only=False)
    assert target.exists(), "the attack is none, so that the test shows nothing"


@ATTACKS
def test_pickled_code_of_a_newer_protocol_is_not_run(folder: Path, attack: Any, named: str) -> None:
    target = folder / "pwned"
    torch.save({"extra": attack(target)}, folder / SINGLE, pickle_protocol=4)
    refused(folder, "holds pickled code", "STACK_GLOBAL")
    assert not target.exists()


@ATTACKS
def test_a_file_of_the_old_form_is_refused_and_not_run(
    folder: Path, attack: Any, named: str
) -> None:
    target = folder / "pwned"
    old = {"extra": attack(target)}
    torch.save(old, folder / SINGLE, _use_new_zipfile_serialization=False)
    refused(folder, "not a zip archive of torch", "before torch 1.6", "safetensors")
    assert not target.exists()


def test_a_bare_pickle_and_a_tar_are_refused(folder: Path) -> None:
    (folder / SINGLE).write_bytes(pickle.dumps({"a": 1}))
    refused(folder, "not a zip archive of torch")
    with tarfile.open(folder / SINGLE, "w") as archive:
        archive.add(folder / "config.json", "storages")
    refused(folder, "not a zip archive of torch")


@pytest.mark.parametrize(
    "call",
    [
        Call(bytearray, 2**44),
        Call(torch.Tensor, 2**44),
        Call(torch.UntypedStorage, 2**44),
        Call(torch._utils._rebuild_meta_tensor_no_storage, torch.float32, (2**50,), (1,), False),
    ],
    ids=["bytearray", "Tensor", "UntypedStorage", "meta"],
)
def test_what_the_loader_would_call_and_weights_do_not_need_is_refused(
    folder: Path, call: Call
) -> None:
    save_pickle(folder / SINGLE, {"a": call}, {})
    refused(folder, "holds pickled code")


@pytest.mark.filterwarnings("ignore:.*is deprecated.*:DeprecationWarning")
def test_a_torchscript_archive_is_refused(folder: Path) -> None:
    traced = torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))  # type: ignore[no-untyped-call]
    torch.jit.save(traced, str(folder / SINGLE))  # type: ignore[no-untyped-call]
    refused(folder, SINGLE)


def test_crafted_archives_are_read_as_torch_reads_them(folder: Path) -> None:
    """What the refusals below change is right before they change it."""
    whole = torch.arange(6.0)
    save_pickle(
        folder / SINGLE,
        {"a": view(Storage("0", 6), 1, (2, 2), (3, 1))},
        {"0": whole.numpy().tobytes()},
    )
    assert torch.equal(open_files(folder).read("a"), torch.tensor([[1.0, 2.0], [4.0, 5.0]]))


@pytest.mark.parametrize(
    ("tensor", "parts"),
    [
        (view(Storage("0", 2**40), 0, (2**40,), (1,)), ()),
        (view(Storage("0", 8), 0, (8,), (1,)), ()),
        (view(Storage("0", 5), 0, (5,), (1,)), ("sizes of the tensors' storages",)),
        (view(Storage("0", 6), 0, (2**40,), (1,)), ("damaged",)),
        (view(Storage("0", 6), 0, (2**40,), (0,)), ("'a' is larger than its storage", "<= 24")),
        (view(Storage("0", 6), 5, (2,), (1,)), ("damaged",)),
        (view(Storage("0", 6), 2**40, (1,), (1,)), ("damaged",)),
        (view(Storage("0", 6), -1, (1,), (1,)), ("damaged",)),
        (view(Storage("0", 6), 5, (6,), (-1,)), ("damaged",)),
        (view(Storage("1", 6), 0, (6,), (1,)), ("damaged",)),
        (view(Storage("../../0", 6), 0, (6,), (1,)), ("damaged",)),
        (view(Storage("0", -6), 0, (6,), (1,)), ()),
        (view(Storage("0", 6, torch.DoubleStorage), 0, (6,), (1,)), ("storages",)),
    ],
)
def test_claimed_sizes_are_held_to_the_file(
    folder: Path, tensor: Call, parts: tuple[str, ...]
) -> None:
    storage = torch.arange(6.0).numpy().tobytes()
    save_pickle(folder / SINGLE, {"a": tensor}, {"0": storage})
    refused(folder, SINGLE, *parts)
