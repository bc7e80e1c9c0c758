"""coremltools, imported without its chatter and without what we do not use of it."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lorgnette.errors import MissingExtraError


@contextmanager
def _quietly_and_alone() -> Iterator[None]:
    """Hides what coremltools converts from and we do not: without, importing takes twice as long.

    Loggers speak of libraries of macOS, which a wheel of Linux has not, and of newer versions.
    """
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    hidden = [name for name in ("transformers", "sklearn") if name not in sys.modules]
    sys.modules |= dict.fromkeys(hidden)  # type: ignore[arg-type] # None: not to be found
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImportError as error:
        raise MissingExtraError(
            "lowering to Core ML needs coremltools",
            got=error,
            hint="pip install 'lorgnette[coreml]'",
        ) from error
    finally:
        for name in hidden:
            del sys.modules[name]
        logging.disable(before)


with _quietly_and_alone():
    import coremltools
    from coremltools.converters.mil.backend.mil.load import BlobWriter, MILProtoExporter
    from coremltools.converters.mil.mil import Builder, Function, Program, Var, types
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY
    from coremltools.proto import FeatureTypes_pb2, Model_pb2

IOS18 = coremltools.target.iOS18
SPECIFICATION_VERSION = 9
"""Of iOS 18; it belongs to the opset CoreML8."""

__all__ = [
    "IOS18",
    "PASS_REGISTRY",
    "SPECIFICATION_VERSION",
    "BlobWriter",
    "Builder",
    "FeatureTypes_pb2",
    "Function",
    "MILProtoExporter",
    "Model_pb2",
    "Program",
    "Var",
    "types",
]
