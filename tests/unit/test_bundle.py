"""Bundles: what a reader refuses."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorgnette import bundle as bundle_module
from lorgnette.bundle import open_bundle, safe_relative, writing
from lorgnette.errors import EXIT_WRONG_INPUT, BundleError
from lorgnette.manifest import Manifest, decode_manifest, encode_manifest
from tests.small_bundle import MANIFEST, Json, fill, make_bundle


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "tiny.lorg")


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


@pytest.mark.parametrize(("major", "hint"), [(3, "update lorgnette"), (1, "export it again")])
def test_other_major(path: Path, major: int, hint: str) -> None:
    def change(values: Json) -> None:
        values["format"]["major"] = major
        values["something_new"] = 1  # must not hide the reason

    edit(path, change)
    refused(path, "not supported", f"version {major}.0", "2.x", hint)


def test_newer_minor_is_read(path: Path) -> None:
    edit(path, lambda v: v["format"].update(minor=7))
    assert open_bundle(path).manifest.format.minor == 7


def test_an_older_minor_tells_of_nothing_new(path: Path) -> None:
    def change(values: Json) -> None:
        for key in ("functions", "exceptions", "fallbacks", "advice"):
            for component in values["components"]:
                component.pop(key, None)
        values.pop("not_run", None)
        values["recipe"].pop("max_fallback", None)

    edit(path, change)
    manifest = open_bundle(path).manifest
    assert manifest.format.minor == 0
    assert (manifest.not_run, manifest.recipe.max_fallback) == ("", None)
    for entry in manifest.components:
        new = (entry.functions, entry.exceptions, entry.fallbacks, entry.advice)
        assert new == ((), (), (), ())


def test_what_targets_tell_is_read_as_it_stands(path: Path) -> None:
    tensor = {"name": "x", "dtype": "float16", "shape": [1, "T"]}
    function = {
        "name": "decode_one",
        "entry_point": "decode",
        "inputs": [tensor],
        "outputs": [],
        "states": [tensor],
        "graph": "graphs/one.onnx",
        "positions": 3,
        "weights": "graphs/two.onnx",
    }
    fallback = {"operator": "a.b", "source": "export/x.py:3", "count": 2, "reason": "none"}
    told: Json = {
        "functions": [function],
        "exceptions": ["scales rounded to float16"],
        "fallbacks": [fallback],
        "advice": ["too many axes"],
    }

    def change(values: Json) -> None:
        values["components"][0] |= told
        values["not_run"] = "its chip is elsewhere"

    edit(path, change)
    manifest = open_bundle(path).manifest
    entry = manifest.components[0]
    assert msgspec.to_builtins(entry.functions[0].states[0].shape) == (1, "T")
    again = json.loads(encode_manifest(manifest))
    assert {key: again["components"][0][key] for key in told} == told
    assert again["not_run"] == manifest.not_run == "its chip is elsewhere"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fallbacks", [{"operator": "a.b", "source": "", "count": "2", "reason": ""}]),
        ("functions", [{"name": "f", "entry_point": "decode", "inputs": []}]),
        ("exceptions", "none"),
        ("advice", [3]),
    ],
)
def test_what_targets_tell_is_checked(path: Path, key: str, value: object) -> None:
    edit(path, lambda values: values["components"][0].update({key: value}))
    refused(path, "manifest is not valid", key)


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
    "major": lambda v: v["format"].update(major="2"),
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
