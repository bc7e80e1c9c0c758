"""coremltools, imported without its chatter: what it says is about frontends that we do not use."""

from __future__ import annotations

import logging
import warnings

from lorgnette.errors import MissingExtraError

_before = logging.root.manager.disable
logging.disable(logging.ERROR)  # libraries of macOS that a Linux wheel has not, and newer torch
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import coremltools
        from coremltools.converters.mil.backend.mil.load import BlobWriter, MILProtoExporter
        from coremltools.converters.mil.mil import Builder, Function, Program, Var, types
        from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY
        from coremltools.proto import FeatureTypes_pb2, Model_pb2
except ImportError as error:
    raise MissingExtraError(
        "lowering to Core ML needs coremltools",
        got=error,
        hint="pip install 'lorgnette[coreml]'",
    ) from error
finally:
    logging.disable(_before)

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
