"""`lorgnette doctor`: whether this machine has what lorgnette needs."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

import lorgnette
from lorgnette.cli.output import Command, print_json, printable, size, table
from lorgnette.errors import EXIT_CHECK_FAILED
from lorgnette.runtime.profile.machine import cpu_features, memory
from lorgnette.runtime.threads import usable_cores

TELEMETRY = "ORT_DISABLE_TELEMETRY"


@click.command(cls=Command)
def doctor(as_json: bool) -> None:
    """Tells what is installed and what this machine has.

    Exits with 1 where the base install cannot work; what only the export needs is told, not
    required.
    """
    document = examine()
    if as_json:
        print_json(document)
    else:
        _print(document)
    if not document["sound"]:
        click.get_current_context().exit(EXIT_CHECK_FAILED)


def examine() -> dict[str, Any]:
    """Everything that doctor tells, and under `problems` what stops the base install."""
    telemetry = os.environ.get(TELEMETRY)  # before the engine is loaded, which sets it
    base, extra = (packages(wanted) for wanted in requirements())
    engine = examine_engine()
    python_fits = sys.version_info >= (3, 11)
    problems = [] if python_fits else [f"Python {platform.python_version()}: install 3.11 or newer"]
    problems += _package_problems(base, "lorgnette")
    if engine["error"]:
        problems.append(f"the runtime does not load: {engine['error']}")
    return {
        "lorgnette": lorgnette.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_features": cpu_features(),
        "usable_cores": usable_cores(),
        "memory_bytes": memory(),
        "free_disk_bytes": shutil.disk_usage(".").free,
        "telemetry": {TELEMETRY: telemetry},
        "engine": engine,
        "packages": base,
        "export_packages": extra,
        "export_problems": _package_problems(extra, "lorgnette[export]"),
        "problems": problems,
        "sound": not problems,
    }


def requirements() -> tuple[dict[str, str], dict[str, str]]:
    """What the base install and what the export extra want: package to version specifiers.

    Taken from the installed package or, in a plain checkout, from pyproject.toml beside it.
    """
    try:
        lines = importlib.metadata.requires("lorgnette") or []
    except importlib.metadata.PackageNotFoundError:
        lines = _checkout_requirements(Path(lorgnette.__file__).parent.parent / "pyproject.toml")
    base, extra = {}, {}
    for line in lines:
        requirement, _, marker = line.partition(";")
        name, specifiers = re.fullmatch(r"\s*([\w.-]+)\s*(.*?)\s*", requirement).groups()  # type: ignore[union-attr]
        if not marker.strip():
            base[name] = specifiers
        elif re.search(r"extra == ['\"]export['\"]", marker):
            extra[name] = specifiers
    return base, {name: wanted for name, wanted in extra.items() if name not in base}


def _checkout_requirements(file: Path) -> list[str]:
    if not file.is_file():
        return []
    project = tomllib.loads(file.read_text("utf-8"))["project"]
    extra: list[str] = project.get("optional-dependencies", {}).get("export", [])
    return [*project["dependencies"], *(f"{line}; extra == 'export'" for line in extra)]


def packages(wanted: dict[str, str]) -> list[dict[str, Any]]:
    """The installed version of each package and whether it fits."""
    found = []
    for name, specifiers in wanted.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        fit = version is not None and fits(version, specifiers)
        found.append({"name": name, "wanted": specifiers, "installed": version, "fits": fit})
    return found


def fits(version: str, specifiers: str) -> bool:
    """Whether a version fulfils specifiers of the kinds `>=1.2`, `<3`, `==1.2.3`, `==1.2.*`, `!=1`.

    Compares the numbers of the release; pre-releases and local versions count as their release.
    """
    release = _release(version)
    for specifier in filter(None, (part.strip() for part in specifiers.split(","))):
        operator, wanted = re.fullmatch(r"([<>=!~]*)\s*(.*)", specifier).groups()  # type: ignore[union-attr]
        other = _release(wanted.removesuffix(".*"))
        width = len(other) if wanted.endswith(".*") else max(len(release), len(other))
        order = _compare(release[:width], other, width)
        fulfilled = {">=": order >= 0, "<=": order <= 0, ">": order > 0, "<": order < 0}
        fulfilled |= {"==": order == 0, "!=": order != 0}
        if not fulfilled.get(operator, False):
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def _compare(a: tuple[int, ...], b: tuple[int, ...], width: int) -> int:
    left, right = (part + (0,) * (width - len(part)) for part in (a, b))
    return (left > right) - (left < right)


def _package_problems(found: Iterable[dict[str, Any]], install: str) -> list[str]:
    bad = [
        f"{entry['name']} {entry['installed'] or 'missing'}, wanted {entry['wanted'] or 'any'}"
        for entry in found
        if not entry["fits"]
    ]
    return [f"{'; '.join(bad)}: pip install '{install}'"] if bad else []


def examine_engine() -> dict[str, Any]:
    """Whether the runtime and its engine can be loaded, and what the engine computes with."""
    found: dict[str, Any] = {"name": "onnxruntime", "version": None, "providers": [], "error": None}
    try:
        importlib.import_module("lorgnette.runtime.model")
        importlib.import_module("lorgnette.runtime.engines.onnx")  # turns telemetry off
        onnxruntime = importlib.import_module("onnxruntime")
        found["providers"] = onnxruntime.get_available_providers()
    except Exception as error:  # a broken native library raises all kinds, and here it is told
        return {**found, "error": f"{type(error).__name__}: {error}"}
    if "CPUExecutionProvider" not in found["providers"]:
        found["error"] = (
            "onnxruntime has no CPU provider: pip install --force-reinstall onnxruntime"
        )
    return {**found, "version": onnxruntime.__version__}


def _print(document: dict[str, Any]) -> None:
    sizes = document["memory_bytes"]
    known = {name.replace("_", " "): size(value) for name, value in sizes.items() if value}
    engine, features = document["engine"], document["cpu_features"]
    rows: list[tuple[str, ...]] = [
        ("lorgnette", document["lorgnette"]),
        ("python", document["python"]),
        ("platform", document["platform"]),
        ("cpu", "unknown" if features is None else " ".join(features) or "no known features"),
        ("cores", str(document["usable_cores"])),
        ("memory", ", ".join(f"{name} {value}" for name, value in known.items()) or "unknown"),
        ("free disk here", size(document["free_disk_bytes"])),
        ("engine", engine["error"] or f"{engine['name']}: {', '.join(engine['providers'])}"),
        ("telemetry", _telemetry(document["telemetry"][TELEMETRY])),
    ]
    for title, key in (("package", "packages"), ("export", "export_packages")):
        for entry in document[key]:
            state = "ok" if entry["fits"] else "NOT OK"
            installed = entry["installed"] or "missing"
            text = f"{entry['name']} {installed}, wanted {entry['wanted'] or 'any'}: {state}"
            rows.append((title, text))
    for line in table(rows, indent=""):
        click.echo(printable(line))
    for problem in document["export_problems"]:
        click.echo(f"export does not work here: {problem}")
    for problem in document["problems"]:
        click.echo(f"problem: {problem}")
    if document["sound"]:
        click.echo("The base install is sound.")


def _telemetry(value: str | None) -> str:
    state = "not set" if value is None else f"{value!r}"
    return f"{TELEMETRY} was {state}; lorgnette sets it to '1' before it loads the engine"
