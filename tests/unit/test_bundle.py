"""Bundles: what a reader refuses, and that writing is all or nothing."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorgnette import bundle as bundle_module
from lorgnette.bundle import (
    Bundle,
    list_files,
    open_bundle,
    safe_relative,
    write_manifest,
    writing,
)
from lorgnette.errors import EXIT_WRONG_INPUT, BundleError, LorgnetteError
from lorgnette.manifest import Manifest, decode_manifest, encode_manifest

ROOT = Path(__file__).resolve().parents[2]
Json = dict[str, Any]

VALUES: Json = {
    "format": {"major": 1, "minor": 0},
    "requires": ["tiles"],
    "producer": {"lorgnette": "1"},
    "checkpoint": "tiny",
    "recipe": {"quant": "int4"},
    "spec": {
        "family": "smolvlm",
        "model_type": "smolvlm",
        "vision": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "layers": 2,
            "heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "norm_eps": 1e-6,
        },
        "text": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "layers": 3,
            "heads": 4,
            "kv_heads": 2,
            "head_size": 16,
            "vocab_size": 512,
            "max_positions": 256,
            "rope_theta": 1e4,
            "norm_eps": 1e-5,
            "tied_embeddings": False,
        },
        "projector_scale": 2,
        "image_token_id": 486,
    },
    "engine": "onnxruntime",
    "context_length": 256,
    "components": [
        {
            "name": "decoder",
            "entry_points": ["prefill", "decode"],
            "graph": "graphs/decoder.onnx",
            "inputs": [{"name": "embeddings", "dtype": "float32", "shape": [1, "T", 64]}],
            "outputs": [],
            "cache_inputs": [],
            "cache_outputs": [],
            "operators": {"ai.onnx::Add": 1},
            "weight_bytes": {"float32": 4},
            "kept_in_float": {},
        }
    ],
    "preprocess": {
        "kind": "tiles",
        "tile_size": 32,
        "longest_edge": 128,
        "split": True,
        "resample": "lanczos",
        "rescale": 1 / 255,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    },
    "prompt": {
        "prefix": "<|im_start|>",
        "turns": {"user": {"header": "User: ", "header_image_first": "User:", "footer": "\n"}},
        "generation": "Assistant:",
        "image": {
            "image_token": "<image>",
            "tokens_per_tile": 4,
            "tile": "{image}",
            "row_end": "\n",
            "thumbnail": "{image}",
            "single": "{image}",
        },
        "stop_token_ids": [511],
    },
    "golden": {
        "folder": "golden",
        "bounds": {"image_tokens": 0.1, "logits": 0.1, "greedy_ids_equal": False},
    },
    "files": [],
}
MANIFEST = msgspec.convert(VALUES, Manifest)


def fill(folder: Path, content: bytes = b"graph") -> None:
    (folder / "graphs").mkdir()
    (folder / "graphs" / "decoder.onnx").write_bytes(content)
    (folder / "graphs" / "weights.bin").write_bytes(b"\0" * 100)
    write_manifest(folder, msgspec.structs.replace(MANIFEST, files=list_files(folder)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good bundle."""
    with writing(tmp_path / "tiny.lorg") as folder:
        fill(folder)
    return tmp_path / "tiny.lorg"


def edit(path: Path, change: Callable[[Json], object]) -> None:
    values = json.loads((path / "manifest.json").read_text())
    change(values)
    (path / "manifest.json").write_text(json.dumps(values))


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(BundleError) as caught:
        open_bundle(path)
    assert caught.value.exit_code == EXIT_WRONG_INPUT
    told = str(caught.value)
    assert "\n" not in told
    for part in parts:
        assert part in told, told


def test_round_trip(path: Path) -> None:
    opened = open_bundle(path)
    assert msgspec.structs.replace(opened.manifest, files=()) == MANIFEST
    assert [entry.path for entry in opened.manifest.files] == [
        "graphs/decoder.onnx",
        "graphs/weights.bin",
    ]
    assert opened.file("graphs/decoder.onnx").read_bytes() == b"graph"
    opened.check_digests()
    assert opened.manifest.component("decoder").graph == "graphs/decoder.onnx"


def test_same_content_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    with writing(tmp_path / "again.lorg") as folder:
        fill(folder)
    assert (path / "manifest.json").read_bytes() == (
        tmp_path / "again.lorg" / "manifest.json"
    ).read_bytes()


def test_missing_bundle(tmp_path: Path) -> None:
    refused(tmp_path / "none.lorg", "does not exist", "none.lorg", "lorgnette export")


def test_file_in_place_of_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "file.lorg").write_text("x")
    refused(tmp_path / "file.lorg", "not a directory")


def test_missing_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()
    refused(path, "'manifest.json' is missing")


NAMES_OUTSIDE = [
    "../weights.bin",
    "graphs/../../x",
    "..",
    ".",
    "",
    "/etc/passwd",
    "//host/share",
    "C:/x",
    "C:x",
    "graphs\\decoder.onnx",
    "..\\x",
    "graphs//decoder.onnx",
    "./graphs/decoder.onnx",
    "graphs/decoder.onnx/",
    "graphs/./decoder.onnx",
    "graphs/decoder.onnx\0",
    "graphs/\n",
]


@pytest.mark.parametrize("name", NAMES_OUTSIDE)
def test_path_outside(path: Path, name: str) -> None:
    edit(path, lambda v: v["files"][0].update(path=name))
    refused(path, "path leaves the bundle", "manifest.json", repr(name))


@settings(max_examples=300)
@given(st.text("./\\:a\0 ", max_size=8) | st.text(max_size=8))
def test_paths_that_pass_stay_inside(name: str) -> None:
    try:
        relative = safe_relative(name, "here")
    except BundleError:
        return
    root = Path("/bundle")
    joined = Path(os.path.normpath(root / name))
    assert joined != root
    assert joined.is_relative_to(root)
    assert relative.as_posix() == name


def test_half_a_surrogate_in_a_path(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace("graphs/weights.bin", "graphs/\\ud800"))
    refused(path)


def test_symlinked_file(path: Path, tmp_path: Path) -> None:
    file = path / "graphs" / "weights.bin"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    refused(path, "'graphs/weights.bin' goes through a link")


def test_symlinked_folder(path: Path, tmp_path: Path) -> None:
    (path / "graphs").rename(tmp_path / "elsewhere")
    (path / "graphs").symlink_to(tmp_path / "elsewhere")
    refused(path, "goes through a link")


def test_symlinked_manifest(path: Path, tmp_path: Path) -> None:
    (path / "manifest.json").rename(tmp_path / "elsewhere")
    (path / "manifest.json").symlink_to(tmp_path / "elsewhere")
    refused(path, "'manifest.json' goes through a link")


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_not_a_plain_file(path: Path, kind: str) -> None:
    file = path / "graphs" / "weights.bin"
    file.unlink()
    file.mkdir() if kind == "folder" else os.mkfifo(file)
    refused(path, "'graphs/weights.bin' is not a plain file")


def test_missing_file(path: Path) -> None:
    (path / "graphs" / "weights.bin").unlink()
    refused(path, "'graphs/weights.bin' is missing", "export the bundle again")


@pytest.mark.parametrize("content", [b"", b"\0" * 99, b"\0" * 101])
def test_wrong_size(path: Path, content: bytes) -> None:
    (path / "graphs" / "weights.bin").write_bytes(content)
    refused(path, "'graphs/weights.bin'", f"{len(content)} bytes", "100 bytes")


def test_changed_byte(path: Path) -> None:
    (path / "graphs" / "weights.bin").write_bytes(b"\0" * 50 + b"\1" + b"\0" * 49)
    opened = open_bundle(path)
    with pytest.raises(BundleError, match=r"'graphs/weights\.bin' was changed") as caught:
        opened.check_digests()
    assert caught.value.exit_code == EXIT_WRONG_INPUT


def test_file_that_is_not_listed(path: Path) -> None:
    (path / "extra").write_text("x")
    opened = open_bundle(path)
    for name in ("extra", "manifest.json", "../tiny.lorg/graphs/decoder.onnx"):
        with pytest.raises(BundleError, match="not part of the bundle"):
            opened.file(name)


def test_unknown_component(path: Path) -> None:
    with pytest.raises(BundleError, match="component 'encoder' is missing"):
        open_bundle(path).manifest.component("encoder")


@pytest.mark.parametrize(("major", "hint"), [(2, "update lorgnette"), (0, "export it again")])
def test_other_major(path: Path, major: int, hint: str) -> None:
    def change(values: Json) -> None:
        values["format"]["major"] = major
        values["something_new"] = 1  # must not hide the reason

    edit(path, change)
    refused(path, "not supported", f"version {major}.0", "1.x", hint)


def test_newer_minor_is_read(path: Path) -> None:
    edit(path, lambda v: v["format"].update(minor=7))
    assert open_bundle(path).manifest.format.minor == 7


def test_unknown_requirement(path: Path) -> None:
    def change(values: Json) -> None:
        values["requires"] += ["warp", "audio"]
        values["preprocess"] = {"kind": "sound"}

    edit(path, change)
    refused(path, "needs a newer reader", "audio, warp", "update lorgnette")


CHANGES: dict[str, Callable[[Json], object]] = {
    "extra": lambda v: v.update(extra=1),
    "no spec": lambda v: v.pop("spec"),
    "context": lambda v: v.update(context_length="256"),
    "resample": lambda v: v["preprocess"].update(resample="nearest"),
    "kind": lambda v: v["preprocess"].update(kind="sound"),
    "dtype": lambda v: v["components"][0]["inputs"][0].update(dtype="float8"),
    "major": lambda v: v["format"].update(major="1"),
    "bytes": lambda v: v["files"][0].update(bytes=1.5),
    "files": lambda v: v.update(files={}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_manifest_of_the_wrong_types(path: Path, change: str) -> None:
    edit(path, CHANGES[change])
    refused(path, "manifest is not valid", "manifest.json")


@pytest.mark.parametrize("keep", [0, 1, 200, -3])
def test_truncated_manifest(path: Path, keep: int) -> None:
    file = path / "manifest.json"
    file.write_bytes(file.read_bytes()[:keep])
    refused(path, "manifest is not valid")


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"format":', b'{"files":['])
def test_deeply_nested_manifest(path: Path, opening: bytes) -> None:
    (path / "manifest.json").write_bytes(opening * 200_000)
    refused(path, "manifest is not valid")


def test_oversized_manifest(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "MAX_MANIFEST_BYTES", 100)
    refused(path, "too large", "<= 100")


@settings(max_examples=300)
@given(st.data())
def test_any_damage_to_a_manifest_is_told(data: st.DataObject) -> None:
    content = bytearray(encode_manifest(MANIFEST))
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BundleError):
        assert isinstance(decode_manifest(bytes(content), "here"), Manifest)


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    def interrupted() -> None:
        with writing(tmp_path / "x.lorg") as folder:
            fill(folder)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_the_final_name_appears_last(tmp_path: Path) -> None:
    with writing(tmp_path / "deep" / "x.lorg") as folder:
        assert not (tmp_path / "deep" / "x.lorg").exists()
        fill(folder)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.lorg"]


@pytest.mark.parametrize("name", ["x", "x.zip", ".lorg", "x.lorg.d", "x.LORG"])
def test_wrong_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(LorgnetteError, match=r"end in \.lorg") as caught, writing(tmp_path / name):
        pytest.fail("entered")
    assert caught.value.exit_code == EXIT_WRONG_INPUT
    assert list(tmp_path.iterdir()) == []


def test_existing_bundle_is_kept(path: Path) -> None:
    with pytest.raises(LorgnetteError, match=r"exists already.*--force") as caught, writing(path):
        pytest.fail("entered")
    assert caught.value.exit_code == EXIT_WRONG_INPUT
    open_bundle(path).check_digests()


def test_existing_bundle_is_replaced(path: Path) -> None:
    with writing(path, replace=True) as folder:
        fill(folder, b"another")
    assert open_bundle(path).file("graphs/decoder.onnx").read_bytes() == b"another"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_failed_replacement_keeps_the_old(path: Path) -> None:
    with pytest.raises(RuntimeError), writing(path, replace=True):
        raise RuntimeError
    open_bundle(path).check_digests()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_failed_renaming_keeps_the_old(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name.endswith(str(os.getpid())) and "old" not in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(LorgnetteError, match="Input/output"), writing(path, replace=True) as folder:
        fill(folder, b"another")
    assert open_bundle(path).file("graphs/decoder.onnx").read_bytes() == b"graph"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", ["folder", "file", "link", "broken link"])
def test_what_is_no_bundle_is_never_replaced(path: Path, kind: str) -> None:
    final = path.with_name("other.lorg")
    if kind == "folder":
        final.mkdir()
        (final / "thesis.txt").write_text("x")
    elif kind == "file":
        final.write_text("x")
    else:
        final.symlink_to(path if kind == "link" else path / "nowhere")
    with pytest.raises(LorgnetteError, match="not a bundle"), writing(final, replace=True):
        pytest.fail("entered")
    assert os.path.lexists(final)
    open_bundle(path).check_digests()


CHILD = """
import sys, time
from lorgnette.bundle import writing
with writing(sys.argv[1]) as folder:
    (folder / "half").write_bytes(b"0" * 1000)
    print(folder, flush=True)
    time.sleep(60)
"""


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    target = tmp_path / "x.lorg"
    command = [sys.executable, "-c", CHILD, str(target)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    partial = Path(child.stdout.readline().strip())
    assert partial.is_dir()
    assert partial.parent == tmp_path
    with writing(target) as folder:  # the other one is alive: its folder is left alone
        assert partial.is_dir()
        fill(folder)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert partial.is_dir()
    with writing(target, replace=True) as folder:
        assert not partial.exists()
        fill(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["x.lorg"]


def test_leftovers_under_our_own_process_id_are_removed(tmp_path: Path) -> None:
    """As in a container, where each run may have the same one."""
    partial = tmp_path / f".x.lorg.partial-{os.getpid()}"
    partial.mkdir()
    (partial / "half").write_text("0")
    with writing(tmp_path / "x.lorg") as folder:
        assert not (folder / "half").exists()
        fill(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["x.lorg"]


@pytest.mark.parametrize(
    "other", [".y.lorg.partial-999999999", ".x.lorg.partial-abc", "x.lorg.bak"]
)
def test_other_folders_are_left_alone(tmp_path: Path, other: str) -> None:
    (tmp_path / other).mkdir()
    with writing(tmp_path / "x.lorg") as folder:
        fill(folder)
    assert (tmp_path / other).is_dir()


def test_brackets_in_a_name(tmp_path: Path) -> None:
    (tmp_path / ".[ab].lorg.partial-999999999").mkdir()
    with writing(tmp_path / "[ab].lorg") as folder:
        fill(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["[ab].lorg"]


def test_full_disk(tmp_path: Path) -> None:
    def interrupted() -> None:
        with writing(tmp_path / "x.lorg") as folder:
            (folder / "half").write_text("0")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(LorgnetteError) as caught:
        interrupted()
    assert caught.value.exit_code == EXIT_WRONG_INPUT
    for part in ("cannot write the bundle", "x.lorg", "No space left", "free some space"):
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(LorgnetteError, match="cannot write the bundle"),
        writing(tmp_path / "file" / "x.lorg"),
    ):
        pytest.fail("entered")


def test_bundle_is_what_its_type_says(path: Path) -> None:
    assert isinstance(open_bundle(str(path)), Bundle)
