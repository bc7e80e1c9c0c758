"""What executes the graphs of a bundle."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, NamedTuple, cast

from lorgnette.errors import BundleError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorgnette.bundle import Bundle
    from lorgnette.runtime.engines.engine import Engine, ProfiledEngine


class Where(NamedTuple):
    """Where an engine is written, and what it needs."""

    module: str
    """The file beside this one."""
    name: str
    """The class in it."""
    needs: tuple[str, ...]
    """Top-level modules that it imports beyond the base install."""
    extra: str
    """The extra that installs them; empty for the base install."""


ENGINES = {
    "onnxruntime": Where("onnx", "OnnxEngine", ("onnxruntime",), ""),
    "coreai": Where("coreai", "CoreAiEngine", ("coreai",), "coreai"),
    "coreml": Where("coreml", "CoreMlEngine", ("coremltools", "torch"), "coreml"),
    "coreml-float32": Where("coreml", "CoreMlEngine", ("coremltools", "torch"), "coreml"),
    "executorch": Where("executorch", "ExecutorchEngine", ("executorch", "torch"), "executorch"),
}
"""Every engine by its name in a manifest."""


def open_engine(bundle: Bundle, threads: int) -> Engine:
    """The engine that the manifest names.

    Raises:
        BundleError: It is unknown, or refuses a graph, or nothing but a device can run it.
        MissingExtraError: What it needs is not installed.
    """
    make = cast("Callable[[Bundle, int], Engine]", _engine_class(bundle))
    return make(bundle, threads)


def open_profiled_engine(bundle: Bundle, threads: int, folder: Path) -> ProfiledEngine | None:
    """The engine, opened to tell what each operator takes; None where its kind cannot.

    Args:
        bundle: The bundle.
        threads: Threads of the engine.
        folder: Where it may write.

    Raises:
        BundleError: As for `open_engine`.
        MissingExtraError: As for `open_engine`.
    """
    found = _engine_class(bundle)
    if not hasattr(found, "end_profiling"):
        return None
    make = cast("Callable[[Bundle, int, Path], ProfiledEngine]", found)
    return make(bundle, threads, folder)


def check_engine(bundle: Bundle) -> None:
    """Refuses a bundle that nothing here runs, before anything is loaded.

    Raises:
        BundleError: Its engine is unknown, or nothing but a device can run it.
        MissingExtraError: What the engine needs is not installed.
    """
    name = bundle.manifest.engine
    if name not in ENGINES:
        wanted = ", ".join(ENGINES)
        raise BundleError("unknown engine", where=bundle.path, got=repr(name), wanted=wanted)
    if bundle.manifest.not_run:
        raise BundleError(
            "bundle cannot be run here", where=bundle.path, got=bundle.manifest.not_run
        )
    if missing := missing_for(name):
        raise MissingExtraError(
            f"the engine '{name}' is not installed",
            where=bundle.path,
            got=f"no {', '.join(missing)}",
            hint=f"pip install 'lorgnette[{ENGINES[name].extra}]'",
        )


def _engine_class(bundle: Bundle) -> object:
    check_engine(bundle)
    where = ENGINES[bundle.manifest.engine]
    return getattr(importlib.import_module(f"{__name__}.{where.module}"), where.name)


def missing_for(name: str) -> list[str]:
    """The modules that an engine needs and this machine lacks; imports nothing."""
    return [need for need in ENGINES[name].needs if importlib.util.find_spec(need) is None]
