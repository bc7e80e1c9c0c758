"""Checkpoints' weights as a plan rounds them, in folders of a test."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from lorgnette.export.component import Component
from lorgnette.export.matrices import matrix_names
from lorgnette.export.weights import WeightSource
from lorgnette.quantize.plan import QuantPlan
from lorgnette.quantize.store import QuantizedModel, QuantizedSource


def quantized_model(
    folder: Path,
    components: Mapping[str, Component],
    sources: Mapping[str, WeightSource],
    plan: QuantPlan,
) -> QuantizedModel:
    """All components; their codes lie in a new folder inside `folder`."""
    codes = Path(tempfile.mkdtemp(dir=folder))
    return QuantizedModel(sources, matrix_names(list(components.values())), plan, codes)


def quantized_source(
    folder: Path, component: Component, source: WeightSource, plan: QuantPlan
) -> QuantizedSource:
    """One component."""
    name = component.name
    return quantized_model(folder, {name: component}, {name: source}, plan).sources[name]
