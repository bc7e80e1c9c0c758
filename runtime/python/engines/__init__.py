"""What executes the graphs of a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorgnette.errors import BundleError

if TYPE_CHECKING:
    from lorgnette.bundle import Bundle
    from lorgnette.runtime.engines.engine import Engine


def open_engine(bundle: Bundle, threads: int) -> Engine:
    """The engine that the manifest names.

    Raises:
        BundleError: It is unknown, or refuses a graph.
    """
    name = bundle.manifest.engine
    if name == "onnxruntime":
        from lorgnette.runtime.engines.onnx import OnnxEngine

        return OnnxEngine(bundle, threads)
    raise BundleError("unknown engine", where=bundle.path, got=repr(name), wanted="onnxruntime")
