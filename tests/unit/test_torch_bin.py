"""Weights of torch.save: what is read, and one test for each way a file can be wrong."""

from __future__ import annotations

import collections
import contextlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorgnette.errors import CheckpointError
from lorgnette.export.checkpoint import open_files
from lorgnette.export.formats import torch_bin
from tests.helpers import write_weights
from tests.torch_files import SINGLE, TENSORS, refused

INDEX = "pytorch_model.bin.index.json"
SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with a config and no weights."""
    (tmp_path / "config.json").write_text('{"model_type": "mobilevlm"}')
    return tmp_path


@pytest.fixture
def sharded(folder: Path) -> Path:
    """A checkpoint of two shards and an index."""
    names = list(TENSORS)
    place = {name: SHARDS[i % 2] for i, name in enumerate(names)}
    for shard in SHARDS:
        torch.save({n: TENSORS[n] for n in names if place[n] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return folder


def rewrite(
    file: Path,
    change: Callable[[dict[str, bytes]], object],
    compression: int = zipfile.ZIP_STORED,
) -> None:
    """Changes the records of an archive, in the order in which they are stored."""
    with zipfile.ZipFile(file) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    change(records)
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def test_reads_one_file(folder: Path) -> None:
    torch.save(collections.OrderedDict(TENSORS), folder / SINGLE)
    opened = open_files(folder)
    assert opened.config == {"model_type": "mobilevlm"}
    assert opened.tensors.keys() == TENSORS.keys()
    for name, wanted in TENSORS.items():
        assert opened.tensors[name].shape == tuple(wanted.shape)
        assert opened.tensors[name].dtype == "F32"
        assert opened.tensors[name].shard == SINGLE
        assert torch.equal(opened.read(name), wanted)


def test_reads_shards(sharded: Path) -> None:
    opened = open_files(sharded)
    assert {info.shard for info in opened.tensors.values()} == set(SHARDS)
    for name, wanted in TENSORS.items():
        assert torch.equal(opened.read(name), wanted)


def test_safetensors_are_preferred(folder: Path) -> None:
    torch.save({"old": torch.ones(1)}, folder / SINGLE)
    write_weights(folder, TENSORS)
    assert open_files(folder).tensors.keys() == TENSORS.keys()


@pytest.mark.parametrize(
    ("dtype", "spelled"),
    [
        (torch.float32, "F32"),
        (torch.float16, "F16"),
        (torch.bfloat16, "BF16"),
        (torch.float64, "F64"),
    ],
)
def test_reads_every_float_dtype_as_float32(folder: Path, dtype: torch.dtype, spelled: str) -> None:
    torch.save({n: t.to(dtype) for n, t in TENSORS.items()}, folder / SINGLE)
    opened = open_files(folder)
    got = opened.read("third")
    assert opened.tensors["third"].dtype == spelled
    assert got.dtype == torch.float32
    assert torch.equal(got, TENSORS["third"].to(dtype).float())


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_reads_views_of_shared_storages(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("views")
    (folder / "config.json").write_text("{}")
    base = torch.arange(60.0).reshape(3, 4, 5)
    views: dict[str, torch.Tensor] = {}
    for i in range(data.draw(st.integers(1, 5))):
        whole = base if data.draw(st.booleans()) else base.clone()
        order = data.draw(st.permutations(range(3)))
        start, step = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 2))
        views[str(i)] = whole.permute(order)[start::step, :, 1:]
    torch.save(views, folder / SINGLE)
    opened = open_files(folder)
    for name, wanted in views.items():
        got = opened.read(name)
        assert torch.equal(got, wanted)
        assert got.is_contiguous()


def test_tied_weights_and_parameters(folder: Path) -> None:
    shared = torch.nn.Parameter(torch.randn(4, 3))
    torch.save({"embed": shared, "head": shared, "row": shared[1]}, folder / SINGLE)
    opened = open_files(folder)
    assert torch.equal(opened.read("head"), shared)
    assert torch.equal(opened.read("row"), shared[1])
    assert not opened.read("embed").requires_grad


def test_a_tensor_read_is_its_own_copy(folder: Path) -> None:
    torch.save(TENSORS, folder / SINGLE)
    opened = open_files(folder)
    opened.read("first").zero_()
    assert torch.equal(opened.read("first"), TENSORS["first"])


def test_opening_reads_no_weights(folder: Path) -> None:
    """The address space grows by the file, the memory of the process hardly."""
    import psutil

    torch.save({"big": torch.ones(16, 2**20)}, folder / SINGLE)
    open_files(folder)  # imports and caches
    before = psutil.Process().memory_info().rss
    opened = open_files(folder)
    after = psutil.Process().memory_info().rss
    assert after - before < 16 * 2**20
    assert opened.tensors["big"].shape == (16, 2**20)


def test_only_reading_an_integer_buffer_is_refused(folder: Path) -> None:
    ids = torch.arange(577).expand((1, -1))
    torch.save(TENSORS | {"vision.position_ids": ids, "seen": torch.tensor(3)}, folder / SINGLE)
    opened = open_files(folder)
    assert opened.tensors["vision.position_ids"].dtype == "I64"
    assert opened.tensors["vision.position_ids"].shape == (1, 577)
    with pytest.raises(CheckpointError, match="'seen' is not a float tensor") as caught:
        opened.read("seen")
    assert SINGLE in str(caught.value)


def test_a_record_that_no_tensor_uses_is_refused(folder: Path) -> None:
    torch.save(TENSORS, folder / SINGLE)
    rewrite(folder / SINGLE, lambda records: records.update({"pytorch_model/data/9": b"1234"}))
    refused(folder, "sizes of the tensors' storages")


def test_a_compressed_archive_is_refused(folder: Path) -> None:
    torch.save(TENSORS | {"zeros": torch.zeros(1000)}, folder / SINGLE)
    rewrite(folder / SINGLE, lambda records: None, zipfile.ZIP_DEFLATED)
    refused(folder, "is compressed")


def test_a_huge_pickle_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(TENSORS, folder / SINGLE)
    monkeypatch.setattr(torch_bin, "MAX_PICKLE_BYTES", 100)
    refused(folder, "data.pkl' is too large", "<= 100")


def test_a_big_endian_archive_is_refused(folder: Path) -> None:
    torch.save(TENSORS, folder / SINGLE)
    rewrite(folder / SINGLE, lambda records: records.update({"pytorch_model/byteorder": b"big"}))
    refused(folder, "big-endian")


@pytest.mark.parametrize(
    "change",
    [
        lambda records: records.pop("pytorch_model/data.pkl"),
        lambda records: records.update({"other/data.pkl": b""}),
        lambda records: records.pop("pytorch_model/data/1"),
        lambda records: records.update({"pytorch_model/data.pkl": b""}),
        lambda records: records.update({"pytorch_model/data.pkl": b"\x80\x02}"}),
        lambda records: records.update({"pytorch_model/data.pkl": b"\x80\x02K\x01."}),
    ],
    ids=["no pickle", "two pickles", "no record", "empty", "cut", "a number"],
)
def test_archives_that_torch_never_writes(folder: Path, change: Any) -> None:
    torch.save(TENSORS, folder / SINGLE)
    rewrite(folder / SINGLE, change)
    refused(folder, SINGLE)


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ([1], ("list",)),
        (torch.ones(2), ("Tensor",)),
        ({"state_dict": TENSORS}, ("'state_dict'", "dict")),
        (TENSORS | {"epoch": 3}, ("'epoch'", "int")),
        ({1: torch.ones(2)}, ("key", "int")),
    ],
)
def test_anything_but_a_flat_dict_is_refused(
    folder: Path, value: object, parts: tuple[str, ...]
) -> None:
    torch.save(value, folder / SINGLE)
    refused(folder, "not a flat dict of tensors", *parts)


def test_a_sparse_tensor_is_refused(folder: Path) -> None:
    torch.save({"a": torch.eye(3).to_sparse()}, folder / SINGLE)
    refused(folder, "_rebuild_sparse_tensor")


def test_an_empty_tensor_is_refused(folder: Path) -> None:
    torch.save(TENSORS | {"second": torch.zeros(0, 3)}, folder / SINGLE)
    refused(folder, "'second' is empty")


@pytest.mark.parametrize("keep", [0, 3, 4, 100, 0.5, 0.9, -1])
def test_cut_off_archives(folder: Path, keep: float) -> None:
    torch.save(TENSORS, folder / SINGLE)
    content = (folder / SINGLE).read_bytes()
    end = int(keep * len(content)) if isinstance(keep, float) else keep
    (folder / SINGLE).write_bytes(content[:end])
    refused(folder, SINGLE)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_damage_is_told(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Random bytes in an archive give a CheckpointError or leave it readable."""
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "config.json").write_text("{}")
    torch.save(TENSORS, folder / SINGLE)
    content = bytearray((folder / SINGLE).read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        content[at] = data.draw(st.integers(0, 255))
    (folder / SINGLE).write_bytes(content)
    with contextlib.suppress(CheckpointError):
        opened = open_files(folder)
        for name, info in opened.tensors.items():
            assert opened.read(name).shape == info.shape


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_damage_of_the_pickle_is_told(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "config.json").write_text("{}")
    torch.save(TENSORS, folder / SINGLE)

    def change(records: dict[str, bytes]) -> None:
        code = bytearray(records["pytorch_model/data.pkl"])
        for at in data.draw(st.lists(st.integers(0, len(code) - 1), min_size=1, max_size=3)):
            code[at] = data.draw(st.integers(0, 255))
        records["pytorch_model/data.pkl"] = bytes(code)

    rewrite(folder / SINGLE, change)
    with contextlib.suppress(CheckpointError):
        opened = open_files(folder)
        for name, info in opened.tensors.items():
            if info.dtype.startswith(("F", "BF")):
                assert opened.read(name).shape == info.shape


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "shard", ["../x.bin", "/etc/passwd", "sub/x.bin", "..\\x.bin", "x.safetensors", "", 3]
)
def test_shard_outside_the_folder(sharded: Path, shard: object) -> None:
    change_index(sharded, lambda index: index.update(first=shard))  # type: ignore[call-overload]
    refused(sharded, "shard of 'first'", "beside the index", INDEX, repr(shard))


def test_index_and_shards_that_disagree(sharded: Path) -> None:
    change_index(sharded, lambda index: index.update(first=index["second"]))
    refused(sharded, "'first'", "not where the index says", INDEX)
    change_index(sharded, lambda index: index.update(first=SHARDS[0], fourth=SHARDS[0]))
    refused(sharded, "'fourth' of the index is missing")


def test_missing_shard(sharded: Path) -> None:
    (sharded / SHARDS[1]).unlink()
    refused(sharded, "weight file is missing", SHARDS[1])
