"""Every kind of scheme that the target says it carries, run by its engine; the rest refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from lorgnette.export.component import Component, TensorSpec
from lorgnette.export.trace import build_module
from lorgnette.export.weights import WeightSource, load_module, module_shapes
from lorgnette.quantize.plan import QuantPlan, Rule
from lorgnette.quantize.scheme import QuantScheme
from lorgnette.targets.capabilities import Matrix
from lorgnette.targets.coreai.lowering import CoreAi
from tests.coreai_support import run_alone
from tests.quantized import quantized_source
from tests.small import single, tensor_folder, weights_of

COLUMNS = 72
"""Fills no last group of 16 but the fifth, and none of 32 or more."""
SCHEMES = [
    QuantScheme(bits=2, group_size=32),
    QuantScheme(bits=2, group_size=16, symmetric=False, scale_bits=16),
    QuantScheme(bits=4, group_size=16, scale_bits=16),
    QuantScheme(bits=4, group_size=64, symmetric=False),
    QuantScheme(bits=4, symmetric=False, scale_bits=16),
    QuantScheme(bits=8, group_size=128, symmetric=False),
    QuantScheme(bits=8),
    QuantScheme(bits=16),
]
MATRICES_ONLY = [
    QuantScheme(bits=4, per_tensor=True),
    QuantScheme(bits=8, per_tensor=True),
    QuantScheme(bits=4, palette=True),
    QuantScheme(bits=6, palette=True),
    QuantScheme(bits=8, palette=True),
]
REFUSED = [
    QuantScheme(bits=3, group_size=32),
    QuantScheme(bits=4, group_size=32, scale_bits=8),
    QuantScheme(bits=4, group_size=256),
    QuantScheme(bits=4, palette=True, table_rows=16),
]


def linear() -> Component:
    return single(
        lambda: nn.Linear(COLUMNS, 40),
        (TensorSpec("x", torch.float32, (1, "T", COLUMNS)),),
        (TensorSpec("y", torch.float32, (1, "T", 40)),),
        axes={"T": (1, 64)},
    )


def table() -> Component:
    return single(
        lambda: nn.Embedding(50, COLUMNS),
        (TensorSpec("x", torch.int64, (1, "T")),),
        (TensorSpec("y", torch.float32, (1, "T", COLUMNS)),),
        axes={"T": (1, 64)},
    )


def both(
    folder: Path, component: Component, scheme: QuantScheme, x: NDArray[np.generic]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What the engine gives, and what torch gives with the numbers that codes stand for."""
    plan = QuantPlan("one", "", (Rule("*", scheme, "kmeans" if scheme.palette else "rtn"),))
    checkpoint = tensor_folder(folder / "checkpoint", weights_of(component))
    weights = WeightSource(checkpoint, module_shapes(build_module(component)), component.rules)
    source = quantized_source(folder, component, weights, plan)
    got = run_alone(folder / "one.aimodel", component, source, x)
    with torch.no_grad():
        wanted = load_module(build_module(component), source)(torch.from_numpy(x))
    return got, wanted.numpy()


@pytest.mark.parametrize("scheme", [*SCHEMES, *MATRICES_ONLY], ids=lambda each: each.form)
def test_a_matrix_multiplies_as_what_its_codes_stand_for(
    tmp_path: Path, scheme: QuantScheme
) -> None:
    matrix = Matrix(component="decoder", name="m", rows=40, columns=COLUMNS, gathered=False)
    assert not CoreAi().check([matrix], QuantPlan("one", "", (Rule("*", scheme),)))
    x = np.random.default_rng(0).standard_normal((1, 5, COLUMNS), dtype=np.float32)
    got, wanted = both(tmp_path, linear(), scheme, x)
    assert np.abs(got - wanted).max() < 1e-6 * np.abs(wanted).max()


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda each: each.form)
def test_rows_of_a_table_are_exactly_what_their_codes_stand_for(
    tmp_path: Path, scheme: QuantScheme
) -> None:
    matrix = Matrix(component="decoder", name="m", rows=50, columns=COLUMNS, gathered=True)
    assert not CoreAi().check([matrix], QuantPlan("one", "", (Rule("*", scheme),)))
    got, wanted = both(tmp_path, table(), scheme, np.array([[3, 49, 0, 3]]))
    assert np.array_equal(got, wanted)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("scheme", REFUSED, ids=lambda each: each.form)
def test_a_scheme_that_cannot_be_carried_is_refused(scheme: QuantScheme, gathered: bool) -> None:
    matrix = Matrix(component="decoder", name="m", rows=40, columns=COLUMNS, gathered=gathered)
    (problem,) = CoreAi().check([matrix], QuantPlan("one", "", (Rule("*", scheme),)))
    assert scheme.form in problem
    assert "nearest" in problem


def test_wide_scales_and_matrices_stay_float16(tmp_path: Path) -> None:
    """Where the converter would not make float32 of them again."""
    wide = single(
        lambda: nn.Linear(64, 66_000, bias=False),
        (TensorSpec("x", torch.float32, (1, "T", 64)),),
        (TensorSpec("y", torch.float32, (1, "T", 66_000)),),
        axes={"T": (1, 64)},
    )
    x = np.random.default_rng(0).standard_normal((1, 1, 64), dtype=np.float32)
    sizes = {}
    for scheme, expected in (
        (QuantScheme(bits=16), 2 * 64 * 66_000),
        (QuantScheme(bits=4, group_size=16, scale_bits=16), 32 * 66_000 + 2 * 4 * 66_000),
    ):
        folder = tmp_path / scheme.form
        folder.mkdir()
        got, wanted = both(folder, wide, scheme, x)
        assert np.abs(got - wanted).max() < 1e-6 * np.abs(wanted).max()
        sizes[scheme.form] = (folder / "one.aimodel" / "main.mlirb").stat().st_size
        assert expected < sizes[scheme.form] < expected + 20_000
