"""GGUF files: what is read, held to the gguf package's own reader, and what is refused."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lorgnette.errors import EXIT_WRONG_INPUT, CheckpointError
from lorgnette.export.checkpoint import combine, open_files
from lorgnette.export.formats import gguf as gguf_module

Kind = gguf.GGMLQuantizationType
HEADER = struct.Struct("<4sIQQ")
TENSORS = {
    "token_embd.weight": np.arange(192, dtype=np.float32).reshape(3, 64),
    "blk.0.attn_q.bias": np.array([1.5, -2.25], dtype=np.float32),
    "v.patch_embd.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2) / 7,
}


def write(
    file: Path,
    tensors: dict[str, NDArray[np.float32]] | None = None,
    kind: Kind = Kind.F32,
    more: Callable[[gguf.GGUFWriter], object] = lambda writer: None,
) -> Path:
    """A file of the package's own writer; rows that are no whole blocks stay float32."""
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_uint32("qwen2.block_count", 24)
    writer.add_float32("qwen2.rope.freq_base", 1e6)
    writer.add_bool("siglip.has_omni_vlm_projector", True)
    writer.add_string("general.name", "Größe")
    writer.add_array("siglip.vision.image_mean", [0.5, 0.25, 0.125])
    writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(1000)])
    more(writer)
    for name, values in (TENSORS if tensors is None else tensors).items():
        block = gguf.GGML_QUANT_SIZES[kind][0]
        used = Kind.F32 if values.shape[-1] % block else kind
        writer.add_tensor(name, gguf.quantize(values, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A small file of float32."""
    return write(tmp_path / "model.gguf")


def refused(file: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_files(file)
    assert caught.value.exit_code == EXIT_WRONG_INPUT
    told = str(caught.value)
    assert "\n" not in told
    for part in (*parts, file.name):
        assert part in told, told


def raw(entries: bytes = b"", tensors: bytes = b"", counts: tuple[int, int] = (0, 0)) -> bytes:
    """A file of which only the header counts; `counts` are those of tensors and entries."""
    header = HEADER.pack(b"GGUF", 3, *counts) + entries + tensors
    return header + bytes(-len(header) % 32 + 64)


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(name) + sizes + struct.pack("<IQ", kind, offset)


def test_metadata_is_the_config(file: Path) -> None:
    opened = open_files(file)
    assert opened.path == file
    assert opened.config == {
        "general.architecture": "qwen2",
        "general.name": "Größe",
        "qwen2.block_count": 24,
        "qwen2.rope.freq_base": 1e6,
        "siglip.has_omni_vlm_projector": True,
        "siglip.vision.image_mean": [0.5, 0.25, 0.125],
    }
    tokens = opened.array("tokenizer.ggml.tokens")
    assert tokens is not None
    assert tokens[:2] == ["token 0", "token 1"]
    assert len(tokens) == 1000
    assert opened.array("siglip.vision.image_mean") == [0.5, 0.25, 0.125]
    assert opened.array("nothing") is None
    assert opened.json("config.json") is None


def test_every_type_of_metadata_is_read_as_the_package_reads_it(tmp_path: Path) -> None:
    numbers = {
        "uint8": 200,
        "int8": -100,
        "uint16": 60000,
        "int16": -30000,
        "uint32": 4 * 10**9,
        "int32": -2 * 10**9,
        "uint64": 2**63 + 1,
        "int64": -(2**62),
        "float32": 0.1,
        "float64": 0.1,
        "bool": False,
    }

    def more(writer: gguf.GGUFWriter) -> None:
        for name, value in numbers.items():
            getattr(writer, f"add_{name}")(f"a.{name}", value)
            kind = gguf.GGUFValueType[name.upper()]
            writer.add_key_value(f"b.{name}", [value, value], gguf.GGUFValueType.ARRAY, kind)
        writer.add_array("b.string", ["ä", "", "b"])

    file = write(tmp_path / "all.gguf", more=more)
    config = open_files(file).config
    for key, field in gguf.GGUFReader(file).fields.items():
        if not key.startswith("GGUF.") and key != "tokenizer.ggml.tokens":
            assert config[key] == field.contents(), key
    assert config["a.uint64"] == 2**63 + 1
    assert config["b.string"] == ["ä", "", "b"]
    assert config["a.bool"] is False


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0])
def test_tensors_are_read_rows_first(tmp_path: Path, kind: Kind) -> None:
    file = write(tmp_path / "model.gguf", kind=kind)
    opened = open_files(file)
    assert opened.tensors.keys() == TENSORS.keys()
    for name, values in TENSORS.items():
        got = opened.read(name)
        assert opened.tensors[name].shape == values.shape
        assert opened.path / opened.tensors[name].shard == file
        assert got.dtype == torch.float32
        if kind == Kind.Q8_0 and values.shape[-1] % 32 == 0:
            assert opened.tensors[name].dtype == "Q8_0"
            blocks = values.reshape(*values.shape[:-1], -1, 32)
            scale = np.abs(blocks).max(axis=-1, keepdims=True) / 127
            rounded = np.round(blocks / np.where(scale == 0, 1, scale))
            wanted = (rounded * scale.astype(np.float16).astype(np.float32)).reshape(values.shape)
            np.testing.assert_allclose(got, wanted, rtol=1e-6)
        elif kind == Kind.F16:
            assert np.array_equal(got, values.astype(np.float16).astype(np.float32))
        elif kind == Kind.BF16:
            assert torch.equal(got, torch.from_numpy(values).bfloat16().float())
        else:
            assert opened.tensors[name].dtype == "F32"
            assert np.array_equal(got, values)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    blocks=st.integers(1, 3),
    kind=st.sampled_from([Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0]),
    alignment=st.sampled_from([32, 64, 256]),
    seed=st.integers(0, 99),
)
def test_values_are_those_of_the_package(
    tmp_path_factory: pytest.TempPathFactory,
    shape: list[int],
    blocks: int,
    kind: Kind,
    alignment: int,
    seed: int,
) -> None:
    draw = np.random.default_rng(seed)
    sizes = [(*shape, 32 * blocks), (32,), (2, 64)]
    tensors = {
        str(i): draw.standard_normal(size).astype(np.float32) for i, size in enumerate(sizes)
    }
    file = write(
        tmp_path_factory.mktemp("gguf") / "model.gguf",
        tensors,
        kind,
        lambda writer: writer.add_custom_alignment(alignment),
    )
    opened = open_files(file)
    reader = gguf.GGUFReader(file)
    assert len(reader.tensors) == len(opened.tensors)
    for one in reader.tensors:
        wanted = gguf.dequantize(np.asarray(one.data), one.tensor_type)
        assert opened.tensors[one.name].shape == tuple(reversed(one.shape.tolist()))
        assert np.array_equal(opened.read(one.name), wanted)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0])
def test_a_tensor_is_read_in_parts(
    tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(0).standard_normal((7, 5, 64)).astype(np.float32)
    file = write(tmp_path / "model.gguf", {"a": values}, kind)
    whole = open_files(file).read("a")
    for chunk in (1, 64, 200, 700):
        monkeypatch.setattr(gguf_module, "CHUNK", chunk)
        assert torch.equal(open_files(file).read("a"), whole)


def test_a_tensor_read_is_its_own_copy(file: Path) -> None:
    opened = open_files(file)
    for name in TENSORS:
        opened.read(name).zero_()
        assert np.array_equal(opened.read(name), TENSORS[name])


def test_float64_and_integers(tmp_path: Path) -> None:
    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("double", np.array([0.1, 2.0]))
        writer.add_tensor("ids", np.arange(4, dtype=np.int32))

    opened = open_files(write(tmp_path / "model.gguf", {}, more=more))
    assert torch.equal(opened.read("double"), torch.tensor([0.1, 2.0]))
    with pytest.raises(CheckpointError, match=r"'ids' is not a float tensor .*got I32") as caught:
        opened.read("ids")
    assert "Q8_0" in str(caught.value)


def test_two_files_become_one_checkpoint(tmp_path: Path) -> None:
    language = open_files(write(tmp_path / "llm.gguf"))
    projector = open_files(write(tmp_path / "mmproj.gguf", {"v.x": np.ones(3, np.float32)}))
    both = combine(
        language,
        {"embed": (language, "token_embd.weight"), "vision.x": (projector, "v.x")},
        config={"model_type": "omnivlm"},
        files={"tokenizer.json": b"{}"},
    )
    assert both.path / both.tensors["vision.x"].shard == (tmp_path / "mmproj.gguf").absolute()
    assert both.path / both.tensors["embed"].shard == tmp_path / "llm.gguf"
    assert torch.equal(both.read("vision.x"), torch.ones(3))
    assert both.json("tokenizer.json") == {}
    assert both.array("tokenizer.ggml.tokens") is not None


def test_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.gguf", "file is missing")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "cannot be read"),
        (b"GG", "ends within its header"),
        (b"PK\3\4" + bytes(100), "not GGUF"),
        (HEADER.pack(b"GGUF", 1, 0, 0), "version is not supported"),
        (HEADER.pack(b"GGUF", 4, 0, 0), "got 4, wanted 2 or 3"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "big-endian"),
    ],
)
def test_wrong_start(tmp_path: Path, content: bytes, part: str) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    refused(tmp_path / "model.gguf", part)


def test_a_file_of_the_other_byte_order(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "qwen2", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("a", np.ones(2, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "big.gguf", "big-endian")


def test_every_cut_is_told(file: Path) -> None:
    content = file.read_bytes()
    last = len(content) - 1
    while content[last - 1] == 0:  # what lies behind the last tensor is padding
        last -= 1
    for end in [*range(0, 300), *range(300, last, 97), last]:
        file.write_bytes(content[:end])
        with pytest.raises(CheckpointError) as caught:
            open_files(file)
        assert "\n" not in str(caught.value)


HUGE = struct.pack("<Q", 2**62)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (raw(counts=(2**62, 0)), "too many tensors"),
        (raw(counts=(0, 2**62)), "too many metadata entries"),
        (raw(counts=(60000, 0)), "ends within its header"),
        (raw(HUGE + b"abc", counts=(0, 1)), "too many bytes in a string"),
        (raw(entry("a", 8, HUGE), counts=(0, 1)), "too many bytes in a string"),
        (raw(entry("a", 8, struct.pack("<Q", 2**20)), counts=(0, 1)), "ends within"),
        (raw(entry("a", 9, struct.pack("<I", 8) + HUGE), counts=(0, 1)), "too many values of 'a'"),
        (raw(entry("a", 9, struct.pack("<I", 0) + HUGE), counts=(0, 1)), "too many values of 'a'"),
        (raw(entry("a", 9, struct.pack("<IQ", 6, 2**19)), counts=(0, 1)), "ends within"),
        (raw(entry("a", 9, struct.pack("<IQ", 9, 1)), counts=(0, 1)), "got arrays"),
        (raw(entry("a", 9, struct.pack("<IQ", 77, 1)), counts=(0, 1)), "got 77"),
        (raw(entry("a", 13, bytes(8)), counts=(0, 1)), "unknown type of a value"),
        (raw(2 * entry("a", 4, bytes(4)), counts=(0, 2)), "'a' is there twice"),
        (raw(entry("split.count", 2, b"\2\0"), counts=(0, 1)), "one of several parts"),
        (raw(entry("general.alignment", 4, b"\7\0\0\0"), counts=(0, 1)), "power of two"),
        (raw(entry("general.alignment", 4, bytes(4)), counts=(0, 1)), "power of two"),
        (raw(entry("general.alignment", 8, string("32")), counts=(0, 1)), "power of two"),
        (raw(tensors=tensor("t", (2**40,)), counts=(1, 0)), "'t' ends behind the end"),
        (raw(tensors=tensor("t", (2**62, 2**62)), counts=(1, 0)), "'t' ends behind the end"),
        (raw(tensors=tensor("t", offset=2**63), counts=(1, 0)), "'t' ends behind the end"),
        (raw(tensors=tensor("t", offset=4), counts=(1, 0)), "'t' is not aligned"),
        (raw(tensors=tensor("t", (1,) * 5), counts=(1, 0)), "'t' has too many dimensions"),
        (raw(tensors=2 * tensor("t"), counts=(2, 0)), "'t' is there twice"),
        (raw(tensors=tensor("t", (4, 0)), counts=(1, 0)), "'t' is empty"),
        (raw(tensors=tensor("t", (33,), 8), counts=(1, 0)), "not whole blocks of Q8_0"),
        (raw(tensors=tensor("t", (), 8), counts=(1, 0)), "not whole blocks of Q8_0"),
        (raw(tensors=tensor("t", (256,), 12), counts=(1, 0)), "'t' is of a type"),
        (raw(tensors=tensor("t", (256,), 4), counts=(1, 0)), "got type 4"),
        (raw(tensors=tensor("t", (256,), 999), counts=(1, 0)), "got type 999"),
    ],
)
def test_hostile_headers(tmp_path: Path, content: bytes, part: str) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    refused(tmp_path / "model.gguf", part)


def test_hostile_headers_are_hostile_in_one_place_only(tmp_path: Path) -> None:
    tensors = tensor("t") + tensor("u", (4, 2), offset=32) + tensor("v", ())
    content = raw(entry("a", 4, b"\1\0\0\0"), tensors, (3, 1))
    (tmp_path / "model.gguf").write_bytes(content)
    opened = open_files(tmp_path / "model.gguf")
    assert opened.tensors["u"].shape == (2, 4)
    assert opened.read("v").shape == ()
    assert opened.config == {"a": 1}


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K", "IQ2_XXS"])
def test_an_unsupported_quantisation_is_named(tmp_path: Path, name: str) -> None:
    kind = Kind[name]
    block, width = gguf.GGML_QUANT_SIZES[kind]

    def more(writer: gguf.GGUFWriter) -> None:
        data = np.zeros((2, width), np.uint8)
        writer.add_tensor("blk.0.attn_q.weight", data, raw_dtype=kind)

    file = write(tmp_path / "model.gguf", more=more)
    refused(file, "'blk.0.attn_q.weight'", f"got {name}", "F32, F16, BF16, F64, Q8_0")
    assert block in (32, 256)


def test_a_string_that_is_not_utf8(tmp_path: Path) -> None:
    content = raw(entry("a", 8, struct.pack("<Q", 2) + b"\xff\xfe"), counts=(0, 1))
    (tmp_path / "model.gguf").write_bytes(content)
    refused(tmp_path / "model.gguf", "not UTF-8")


def test_a_hostile_count_allocates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where a limit lets it through, a count is followed only as far as the file goes."""
    import tracemalloc

    for limit in ("MAX_ARRAY", "MAX_ENTRIES", "MAX_TENSORS"):
        monkeypatch.setattr(gguf_module, limit, 2**63)
    file = tmp_path / "model.gguf"
    for content in (
        raw(counts=(2**62, 0)),
        raw(counts=(0, 2**62)),
        raw(entry("a", 9, struct.pack("<I", 8) + HUGE), counts=(0, 1)),
        raw(entry("a", 9, struct.pack("<I", 0) + HUGE), counts=(0, 1)),
    ):
        file.write_bytes(content)
        tracemalloc.start()
        refused(file)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_damage_is_told(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Random bytes in the header give a CheckpointError or leave the file readable."""
    folder = tmp_path_factory.mktemp("damaged")
    tensors = {"one": np.ones((2, 32), np.float32), "two": np.ones(4, np.float32)}
    kind = data.draw(st.sampled_from([Kind.F32, Kind.Q8_0]))
    file = folder / "model.gguf"
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_array("a.b", ["x", "y"])
    for name, values in tensors.items():
        used = Kind.F32 if values.shape[-1] % 32 else kind
        writer.add_tensor(name, gguf.quantize(values, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = bytearray(file.read_bytes())
    for at in data.draw(st.lists(st.integers(0, 220), min_size=1, max_size=3)):
        content[at] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        opened = open_files(file)
        for name, info in opened.tensors.items():
            if not info.dtype.startswith("I"):
                assert opened.read(name).shape == info.shape
