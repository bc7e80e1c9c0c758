"""Apple's converter, imported without a false alarm, and before what can be imported only then."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    # It takes the CPU build "2.13.0+cpu" for a version behind the 2.13.0 that it was tested with.
    warnings.filterwarnings("ignore", message="coreai-torch has only been validated")
    import coreai_torch

from coreai._compiler.dialects import coreai as core

__all__ = ["core", "coreai_torch"]
