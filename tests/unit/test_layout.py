"""The package is laid out, imported, documented and packed as it should be."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import lorgnette

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lorgnette"
LINKS = {
    "export": "../export",
    "quantize": "../quantize",
    "runtime": "../runtime/python",
    "targets": "../targets",
}
CODE_FOLDERS = ("lorgnette", "export", "quantize", "targets", "runtime", "tests", "benchmarks")
MAX_LINES = 500

# What only an export needs: an app that runs a bundle has none of them.
EXPORT_ONLY = {"torch", "onnx", "onnx_ir", "jinja2", "gguf", "transformers"}
# What makes starting slow.
HEAVY = EXPORT_ONLY | {"numpy", "onnxruntime", "PIL", "safetensors", "tokenizers"}

IMPORT_AND_LIST = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted(sys.modules)))
"""

# Tells what the variable was when onnxruntime was first looked for.
WATCH_TELEMETRY = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            print("at import:", os.environ.get("ORT_DISABLE_TELEMETRY"))
        return None
sys.meta_path.insert(0, Watch())
import lorgnette.runtime.engines.onnx
print("after:", os.environ.get("ORT_DISABLE_TELEMETRY"))
"""


def run_python(*arguments: str, environment: dict[str, str] | None = None) -> str:
    """Standard output of a fresh interpreter in the root of the repository."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(*names: str) -> set[str]:
    """Names of all modules loaded once `names` are imported, the root being on sys.path."""
    return set(json.loads(run_python("-c", IMPORT_AND_LIST, *names)))


def module_names() -> list[str]:
    """Every module of the package but `__main__`, which would run."""
    found = pkgutil.walk_packages(lorgnette.__path__, "lorgnette.")
    names = [module.name for module in found if not module.name.endswith(".__main__")]
    return ["lorgnette", *names]


def public_members(holder: ModuleType | type, where: str) -> Iterator[tuple[str, object]]:
    """Public classes, functions, methods and properties defined in a module, with their names."""
    for name, member in vars(holder).items():
        if name.startswith("_"):
            continue
        if isinstance(member, staticmethod | classmethod):
            member = member.__func__
        if isinstance(member, property):
            yield f"{where}.{name}", member
        elif isinstance(member, type | FunctionType):
            if isinstance(holder, ModuleType) and member.__module__ != holder.__name__:
                continue
            yield f"{where}.{name}", member
            if isinstance(member, type):
                yield from public_members(member, f"{where}.{name}")


def own_docstring(member: object) -> str | None:
    """A docstring that someone wrote: not inherited, not made up by dataclass."""
    if not isinstance(member, type):
        return inspect.getdoc(member)
    text = member.__dict__.get("__doc__")
    return None if text is None or text.startswith(f"{member.__name__}(") else text


def code_files() -> list[Path]:
    """Every Python file of the repository, each once."""
    return [
        path
        for folder in CODE_FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents)
    ]


def test_every_folder_is_walked() -> None:
    names = module_names()
    for link in LINKS:
        assert sum(name.startswith(f"lorgnette.{link}.") for name in names) >= 2, link


@pytest.mark.parametrize(("name", "target"), LINKS.items())
def test_links_lead_to_their_folders(name: str, target: str) -> None:
    link = PACKAGE / name
    assert link.is_symlink()
    assert os.readlink(link) == target
    assert (link / "__init__.py").is_file()


def test_importing_the_package_is_light() -> None:
    listing = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import lorgnette"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stderr
    names = {line.rsplit("|", 1)[1].strip() for line in listing.splitlines() if "|" in line}
    assert "lorgnette" in names
    assert not HEAVY & {name.split(".", 1)[0] for name in names}


def test_running_a_bundle_needs_nothing_of_the_export() -> None:
    runtime = [name for name in module_names() if name.startswith("lorgnette.runtime")]
    loaded = imported("lorgnette.bundle", *runtime)
    assert "onnxruntime" in loaded
    assert not EXPORT_ONLY & loaded
    assert not {name for name in loaded if name.startswith(("lorgnette.export", "lorgnette.quant"))}


def test_no_folder_is_imported_by_its_bare_name() -> None:
    names = module_names()
    loaded = imported(*names)
    assert set(names) <= loaded
    assert not set(LINKS) & loaded
    assert "transformers" not in loaded


def test_telemetry_is_off_before_onnxruntime_is_imported() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    said = run_python("-c", WATCH_TELEMETRY, environment=environment).splitlines()
    assert said == ["at import: 1", "after: 1"]


def test_onnxruntime_is_imported_in_one_place() -> None:
    # The place that switches telemetry off first.
    pattern = re.compile(r"^\s*(import|from) onnxruntime\b", re.MULTILINE)
    importing = {
        path.relative_to(ROOT).as_posix()
        for path in code_files()
        if pattern.search(path.read_text(encoding="utf-8"))
        and not path.is_relative_to(ROOT / "tests")
        # Measures others, in processes and environments of their own.
        and not path.is_relative_to(ROOT / "benchmarks")
    }
    assert importing == {"runtime/python/engines/onnx.py"}


@pytest.mark.parametrize("name", module_names())
def test_every_public_name_is_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, name
    missing = [where for where, member in public_members(module, name) if not own_docstring(member)]
    assert not missing


def test_files_are_short() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in code_files()}
    assert len(lines) > len(module_names())
    long = {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > MAX_LINES}
    assert not long


def test_a_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__", "*.lorg")
    for folder in ("lorgnette", *LINKS):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=ignore)
    pip = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run_python(*pip, "--wheel-dir", str(tmp_path), str(source))
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"lorgnette-{lorgnette.__version__}.dist-info/METADATA").decode()
    wanted = {
        Path(folder, file).relative_to(source).as_posix()
        for folder, _, files in os.walk(source / "lorgnette", followlinks=True)
        for file in files
        if file.endswith((".py", "py.typed")) or Path(folder).name == "default_samples"
    }
    assert packed == wanted
    assert {
        "lorgnette/py.typed",
        "lorgnette/runtime/sampler.py",
        "lorgnette/export/layers/rope.py",
        "lorgnette/targets/onnx/lowering.py",
    } <= packed
    assert "License-Expression: Apache-2.0" in metadata.splitlines()
    # Imported from the archive itself, away from the checkout.
    show = (
        f"import sys; sys.path.insert(0, {str(wheel)!r}); import lorgnette.runtime.sampler as s;"
        "print(s.__file__)"
    )
    assert str(wheel) in run_python("-I", "-c", show)
