"""Wrong input, end to end: exit 2, one line on stderr, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lorgnette.cli.output import printable, size
from tests.unit.cli_helpers import (
    ZOO,
    bundle,
    call,
    changed_bundle,
    changed_checkpoint,
    process,
    start,
)


def refused(result: Any, *words: str) -> None:
    """Asserts one line on stderr that holds the words, and exit 2."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def refused_export(checkpoint: Path, folder: Path, *words: str) -> None:
    out = folder / "out"
    out.mkdir()
    refused(call("export", checkpoint, "--out", out / "a.lorg"), *words)
    assert not list(out.iterdir())


def test_a_truncated_shard(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    shutil.copytree(ZOO, path)
    file = path / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    refused_export(path, tmp_path, str(file), "download it again")


def test_an_unknown_architecture(tmp_path: Path) -> None:
    path = changed_checkpoint(tmp_path, "config.json", lambda c: c.update(model_type="nonesuch"))
    refused_export(path, tmp_path, "unknown architecture", "got 'nonesuch'", "idefics3")


def test_an_error_as_a_process_is_one_line_and_with_json_one_document(tmp_path: Path) -> None:
    code, out, err = process("export", tmp_path / "none", "--json")
    assert code == 2
    assert err.startswith(b"error: checkpoint is not a directory in ")
    assert err.count(b"\n") == 1
    told = json.loads(out)["error"]
    assert (told["type"], told["where"], told["exit_code"]) == (
        "CheckpointError",
        str(tmp_path / "none"),
        2,
    )


def test_a_chat_template_that_does_not_fit(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['role'] * messages|length }}{% endfor %}"
    path = tmp_path / "checkpoint"
    shutil.copytree(ZOO, path)
    (path / "chat_template.jinja").write_text(template)
    refused_export(path, tmp_path, "template")


def test_weights_that_are_not_finite_leave_nothing_behind(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "checkpoint"
    shutil.copytree(ZOO, path)
    tensors = load_file(path / "model.safetensors")
    name = "model.vision_model.post_layernorm.bias"
    tensors[name][0] = np.nan
    save_file(tensors, path / "model.safetensors")
    refused_export(path, tmp_path, name, "not finite")


def test_a_file_that_is_no_picture(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_text("not a picture at all")
    refused(call("run", bundle(), "--image", file, "--prompt", "x"), str(file), "not a picture")


def test_an_empty_picture(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.touch()
    refused(call("run", bundle(), "--image", file, "--prompt", "x"), str(file), "empty file")


def test_a_picture_that_is_too_wide(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.new("RGB", (40_000, 2)).save(file)
    result = call("run", bundle(), "--image", file, "--prompt", "x")
    refused(result, str(file), "40000 x 2", "make it smaller")


def test_a_changed_byte_in_a_bundle(tmp_path: Path) -> None:
    path = tmp_path / "a.lorg"
    shutil.copytree(bundle(), path)
    file = path / "graphs" / "weights.bin"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    for command in (["run", "--prompt", "x"], ["verify"]):
        refused(call(*command, path), "graphs/weights.bin", "changed or damaged")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda m: m["files"][0].update(path="../../etc/passwd"), "path leaves the bundle"),
        (lambda m: m["format"].update(major=3), "update lorgnette"),
        (lambda m: m["requires"].append("telepathy"), "telepathy"),
        (lambda m: m.update(engine="nonesuch"), "unknown engine"),
        (lambda m: m.pop("prompt"), "manifest is not valid"),
    ],
)
def test_a_hostile_or_newer_manifest(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], word: str
) -> None:
    path = changed_bundle(tmp_path, change)
    refused(call("run", path, "--prompt", "x"), word)


def test_no_room_on_the_disk_is_told_as_one_line() -> None:
    with open("/dev/full", "wb") as full:
        child = start(["list", "schemes"], stdout=full)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 2
    assert err.startswith(b"error: the system refused: ")
    assert err.count(b"\n") == 1


def test_debug_shows_where_and_then_the_line() -> None:
    result = call("run", "none.lorg", "--prompt", "x", "--debug")
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("error: bundle does not exist in none.lorg")


def test_what_nobody_foresaw_is_exit_70_with_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by accident")

    monkeypatch.setattr("lorgnette.bundle.open_bundle", broken)
    result = call("inspect", "a.lorg", "--json")
    assert result.exit_code == 70
    assert "ZeroDivisionError: by accident" in result.stderr
    assert "report" in result.stderr.splitlines()[-1]
    assert "by accident" in json.loads(result.stdout)["error"]["message"]


def test_a_lack_of_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(*_: object) -> None:
        raise MemoryError("Unable to allocate 3 TiB")

    monkeypatch.setattr("lorgnette.bundle.open_bundle", hungry)
    refused(call("inspect", "a.lorg"), "not enough memory", "3 TiB")


def test_the_line_of_an_error_cannot_steer_a_terminal() -> None:
    refused(call("inspect", "a\x1b[2Jb\x9b.lorg"), "a\N{REPLACEMENT CHARACTER}[2Jb")
    assert printable("a\tb\nc\x07\x1b\x7f") == "a\tb\nc" + "\N{REPLACEMENT CHARACTER}" * 3


@pytest.mark.parametrize(
    ("count", "told"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (2_282_240, "2.28 MB"),
        (512_300_000, "512 MB"),
        (4.49e9, "4.49 GB"),
        (139e9, "139 GB"),
    ],
)
def test_sizes_have_three_digits(count: float, told: str) -> None:
    assert size(count) == told
