"""What the tests of the command line share: bundles made once, and ways to call it."""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from lorgnette.cli.main import cli

ROOT = Path(__file__).resolve().parents[2]
ZOO = ROOT / "tests" / "zoo" / "checkpoints" / "smolvlm-tiny"
RUNGS = ["pixels", "prompt_ids", "image_tokens", "logits", "greedy_ids"]
COMPARED = ["image_tokens", "logits", "greedy_ids"]
SMALL = ("--context", 256, "--measure", 0, "--quant", "fp32")
BOTH = ("coreml", "onnx-cpu")
Made = tuple[list[Path], Any]
"""Bundles of both, and the document of their export."""


def call(*args: object) -> Result:
    """Runs the command line inside this process."""
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def document(*args: object) -> Any:
    """What a command prints with --json; fails unless it succeeds and prints just that."""
    result = call(*args, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout)


def start(args: Sequence[object], *, before: str = "", **options: Any) -> subprocess.Popen[bytes]:
    """Starts the command line as a process of its own, with SIGINT as a terminal has it.

    Args:
        args: Its arguments.
        before: Python to run first, in the same process.
        options: For Popen.
    """
    code = f"{before}\nfrom lorgnette.cli.main import main\nmain()"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Buffered output, as users have it: what cannot be printed then shows up at exit again.
    inherited = {key: v for key, v in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        env={**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdin=options.pop("stdin", subprocess.DEVNULL),
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=options.pop("stderr", subprocess.PIPE),
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler),
        **options,
    )


def process(*args: object) -> tuple[int, bytes, bytes]:
    """Exit code, stdout and stderr of the command line as a process of its own."""
    child = start(args)
    out, err = child.communicate(timeout=120)
    return child.returncode, out, err


def bundle(quant: str = "int4") -> Path:
    """The zoo's checkpoint as a bundle, made once by the command line itself; do not change it."""
    return _export(quant)[0]


def export_document(quant: str = "int4") -> Any:
    """What the export of `bundle` printed."""
    return _export(quant)[1]


@functools.cache
def _export(quant: str) -> tuple[Path, Any]:
    """Exports over an older bundle, with --force."""
    path = _scratch() / f"{quant}.lorg"
    path.mkdir()
    (path / "manifest.json").write_text("older")
    (path / "older").touch()
    asked = ("--quant", quant, "--out", path, "--measure", 4)
    return path, document("export", ZOO, *asked, "--force")


def changed_bundle(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the bundle with another manifest."""
    path = folder / "changed.lorg"
    shutil.copytree(bundle(), path)
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def changed_checkpoint(folder: Path, name: str, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the checkpoint with another JSON file."""
    path = folder / "checkpoint"
    shutil.copytree(ZOO, path)
    values = json.loads((path / name).read_text())
    change(values)
    (path / name).write_text(json.dumps(values))
    return path


def picture(folder: Path, width: int = 96, height: int = 64) -> Path:
    """A drawn picture: a disc on a ramp."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=-1)
    pixels[(x - width // 3) ** 2 + (y - height // 2) ** 2 < (height // 3) ** 2] = (220, 30, 40)
    path = folder / "picture.png"
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@functools.cache
def _scratch() -> Path:
    path = Path(tempfile.mkdtemp(prefix="lorgnette-cli-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def hide(monkeypatch: pytest.MonkeyPatch, *hidden: str) -> None:
    """Makes packages look as if they were not installed."""
    find = importlib.util.find_spec

    def found(name: str, package: str | None = None) -> object:
        return None if name in hidden else find(name, package)

    monkeypatch.setattr("importlib.util.find_spec", found)


def change(source: Path, target: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a bundle with another manifest."""
    shutil.copytree(source, target)
    manifest = json.loads((target / "manifest.json").read_text())
    edit(manifest)
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def vouch(bundle: Path, name: str) -> None:
    """Makes a bundle's manifest vouch for a file as it is now."""
    data = (bundle / name).read_bytes()
    manifest = json.loads((bundle / "manifest.json").read_text())
    (entry,) = [entry for entry in manifest["files"] if entry["path"] == name]
    entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def refused(result: Result, code: int = 2) -> str:
    """The one line on stderr of a command that failed."""
    assert result.exit_code == code, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr
