"""Opening checkpoints: what is read, and one test for each way one can be wrong."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lorgnette.errors import EXIT_WRONG_INPUT, CheckpointError
from lorgnette.export import checkpoint as checkpoint_module
from lorgnette.export.checkpoint import INDEX_NAME, combine, open_files, read_json
from tests.helpers import write_weights

TENSORS = {
    "first": torch.arange(6.0).reshape(2, 3),
    "second": torch.tensor([1.5, -2.25]),
    "third": torch.full((4,), 0.1),
}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A checkpoint of one file."""
    (tmp_path / "config.json").write_text('{"model_type": "smolvlm"}')
    write_weights(tmp_path, TENSORS)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of two shards and an index."""
    (tmp_path / "config.json").write_text('{"model_type": "smolvlm"}')
    write_weights(tmp_path, TENSORS, shards=2)
    return tmp_path


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    file = folder / INDEX_NAME
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_files(folder)
    assert caught.value.exit_code == EXIT_WRONG_INPUT
    told = str(caught.value)
    assert "\n" not in told
    for part in parts:
        assert part in told, told


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_reads_tensors_one_by_one(layout: str, request: pytest.FixtureRequest) -> None:
    opened = open_files(request.getfixturevalue(layout))
    assert opened.config == {"model_type": "smolvlm"}
    assert opened.tensors.keys() == TENSORS.keys()
    for name, wanted in TENSORS.items():
        assert opened.tensors[name].shape == tuple(wanted.shape)
        assert torch.equal(opened.read(name), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_reads_every_float_dtype_as_float32(single: Path, dtype: torch.dtype) -> None:
    save_file({k: v.to(dtype) for k, v in TENSORS.items()}, single / "model.safetensors")
    got = open_files(single).read("third")
    assert got.dtype == torch.float32
    assert torch.equal(got, TENSORS["third"].to(dtype).float())


def test_a_tensor_read_is_its_own_copy(single: Path) -> None:
    opened = open_files(single)
    opened.read("first").zero_()
    assert torch.equal(opened.read("first"), TENSORS["first"])


def test_other_files(single: Path) -> None:
    opened = open_files(single)
    (single / "chat_template.jinja").write_text("é", encoding="utf-8")
    assert opened.text("chat_template.jinja") == "é"
    assert opened.text("nothing.txt") is None
    assert opened.json("nothing.json") is None
    (single / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"not UTF-8 in .*chat_template\.jinja"):
        opened.text("chat_template.jinja")


def test_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "not a directory", "nowhere")


def test_a_file_in_place_of_the_folder(single: Path) -> None:
    refused(single / "config.json", "not a directory", "folder of config.json")


def test_missing_config(single: Path) -> None:
    (single / "config.json").unlink()
    refused(single, "file is missing", "config.json")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"a": }',
        b"\xff\xfe\x00",
        b'{"a": 1} trailing',
        b'{"a":' * 100_000,
        b"[" * 1_000_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
    ids=["empty", "cut", "no value", "bytes", "two", "deep", "deep list", "long number"],
)
def test_invalid_json(single: Path, content: bytes) -> None:
    (single / "config.json").write_bytes(content)
    refused(single, "not valid JSON", "config.json")


@pytest.mark.parametrize("content", ["[1]", "3", "null", '"text"'])
def test_json_that_is_no_object(single: Path, content: str) -> None:
    (single / "config.json").write_text(content)
    refused(single, "JSON object", "config.json")


def test_oversized_json(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "MAX_JSON_BYTES", 20)
    refused(single, "too large", "config.json", "25 bytes", "<= 20")


def test_missing_weights(single: Path) -> None:
    (single / "model.safetensors").unlink()
    refused(single, "weight file is missing", "model.safetensors", "safetensors")


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refused(sharded, "weight file is missing", "model-00002-of-00002.safetensors", "download")


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_truncated_shard(sharded: Path, keep: int) -> None:
    file = sharded / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(sharded, "damaged", file.name)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_damage_is_told(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Random bytes in the header of a shard give a CheckpointError or leave it readable."""
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "config.json").write_text("{}")
    write_weights(folder, TENSORS)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 49), min_size=1, max_size=3)):
        content[at] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        opened = open_files(folder)
        for name in opened.tensors:
            opened.read(name)


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        ".",
        "",
        "..\\x",
        3,
        None,
    ],
)
def test_shard_outside_the_folder(sharded: Path, shard: object) -> None:
    change_index(sharded, lambda index: index.update(first=shard))  # type: ignore[call-overload]
    refused(sharded, "shard of 'first'", "beside the index", INDEX_NAME, repr(shard))


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_index_without_a_map(sharded: Path, content: str) -> None:
    (sharded / INDEX_NAME).write_text(content)
    refused(sharded, "no weight_map", INDEX_NAME)


def test_index_names_a_tensor_that_no_shard_holds(sharded: Path) -> None:
    change_index(sharded, lambda index: index.update(fourth="model-00001-of-00002.safetensors"))
    refused(sharded, "'fourth'", "missing")


def test_index_names_the_wrong_shard(sharded: Path) -> None:
    change_index(sharded, lambda index: index.update(first=index["second"]))
    refused(sharded, "'first'", "not where the index says")


def test_shard_holds_a_tensor_that_the_index_lacks(sharded: Path) -> None:
    change_index(sharded, lambda index: index.pop("first"))
    refused(sharded, "'first'", "no such tensor")


def test_tensor_in_two_shards(sharded: Path) -> None:
    save_file(TENSORS, sharded / "model-00002-of-00002.safetensors")
    refused(sharded, "in two shards")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_only_reading_a_tensor_that_is_not_float_is_refused(
    single: Path, dtype: torch.dtype
) -> None:
    changed = TENSORS | {"second": torch.zeros(2, dtype=dtype)}
    save_file(changed, single / "model.safetensors")
    opened = open_files(single)
    assert opened.tensors["second"].shape == (2,)
    assert torch.equal(opened.read("first"), TENSORS["first"])
    with pytest.raises(CheckpointError, match="'second' is not a float tensor") as caught:
        opened.read("second")
    assert "model.safetensors" in str(caught.value)
    assert opened.tensors["second"].dtype in str(caught.value)


def test_empty_tensor(single: Path) -> None:
    save_file(TENSORS | {"second": torch.zeros(0, 3)}, single / "model.safetensors")
    refused(single, "'second' is empty")


def test_a_virtual_file_is_found_before_one_of_the_directory(single: Path) -> None:
    (single / "a.json").write_text('{"from": "disk"}')
    plain = open_files(single)
    opened = combine(plain, {}, files={"a.json": b'{"from": "memory"}', "b.txt": b"\xff"})
    assert plain.json("a.json") == {"from": "disk"}
    assert opened.json("a.json") == {"from": "memory"}
    assert opened.data("b.txt") == b"\xff"
    assert combine(opened, {}, files={"b.txt": b"b"}).text("b.txt") == "b"
    assert combine(opened, {}).text("a.json") == '{"from": "memory"}'
    with pytest.raises(CheckpointError, match=r"not UTF-8 in .*b\.txt"):
        opened.text("b.txt")


def test_combine_gives_tensors_of_two_checkpoints_new_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "smolvlm"}')
        write_weights(tmp_path / name, {name: torch.full((2,), float(len(name)))})
    write_weights(tmp_path / "two", {"two": torch.full((2,), 7.0)})
    monkeypatch.chdir(tmp_path)
    one, two = open_files("one"), open_files("two")
    both = combine(one, {"a.x": (one, "one"), "b.y": (two, "two")}, config={"model_type": "new"})
    assert both.config == {"model_type": "new"}
    assert one.config == {"model_type": "smolvlm"}
    assert both.tensors.keys() == {"a.x", "b.y"}
    assert torch.equal(both.read("a.x"), torch.full((2,), 3.0))
    assert torch.equal(both.read("b.y"), torch.full((2,), 7.0))
    for name, folder in (("a.x", "one"), ("b.y", "two")):
        info = both.tensors[name]
        assert (both.path / info.shard).samefile(tmp_path / folder / "model.safetensors")
    again = combine(both, {"c": (both, "b.y")})
    assert again.config == both.config
    assert torch.equal(again.read("c"), torch.full((2,), 7.0))
    with pytest.raises(CheckpointError, match="tensor 'three' is missing in two"):
        combine(one, {"b.y": (two, "three")})


def test_read_json_outside_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="file is missing"):
        read_json(tmp_path / "recipe.json")
