"""Codes and scales that come back from a graph are those that were stored, in every form."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from torch import nn

from lorgnette.manifest import Manifest
from lorgnette.quantize.methods import rtn
from lorgnette.quantize.plan import QuantPlan, Rule
from lorgnette.quantize.scheme import QuantScheme
from lorgnette.targets.onnx.lowering import MATRICES
from lorgnette.targets.onnx.read_codes import read_codes
from tests.small import lower, of_width, weights_of

ROWS, COLUMNS = 5, 72
"""So many that they fill the last group of no size."""
SCHEMES = {
    f"{scheme.form}-{scheme.activations}": scheme
    for each in MATRICES
    for scheme in each.schemes()
    if scheme.is_integer
    and scheme.group_size in (0, 16, 64)
    and not scheme.per_tensor
    and scheme.activations in ("float", "int8_token")
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_codes_and_scales_come_back_from_the_graph(tmp_path: Path, scheme: QuantScheme) -> None:
    component = of_width(lambda: nn.Linear(COLUMNS, ROWS, bias=False), COLUMNS)
    weights = weights_of(component)
    lowered = lower(tmp_path, component, weights, QuantPlan("one", "one", (Rule("*", scheme),)))
    entry = SimpleNamespace(name="decoder", graph=lowered.report.graph)
    manifest = cast("Manifest", SimpleNamespace(components=(entry,)))
    (stored,) = read_codes(lowered.folder, manifest)
    (name,) = weights
    wanted = rtn.quantize(weights[name].numpy(), scheme)
    assert (stored.component, stored.name, stored.bits) == ("decoder", name, scheme.bits)
    assert stored.codes.dtype == np.uint8
    assert stored.scales.dtype == np.float32
    assert np.array_equal(stored.codes, wanted.codes[:, :COLUMNS])
    assert np.array_equal(stored.scales, wanted.scales)


def test_every_way_to_store_codes_is_among_them() -> None:
    found = defaultdict(set)
    for scheme in SCHEMES.values():
        found[scheme.activations].add((scheme.bits, bool(scheme.group_size), scheme.scale_bits))
    assert found["float"] == {(b, True, s) for b in (2, 4, 8) for s in (8, 16, 32)}
    assert found["int8_token"] == {(4, False, 32), (8, False, 32), (4, True, 8)}
