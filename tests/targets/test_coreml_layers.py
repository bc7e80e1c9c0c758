"""Single layers as Core ML packages: every scheme that is promised, and norms in float16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet
from torch import nn
from torch.nn import functional

from lorgnette.errors import ConfigError
from lorgnette.export.component import Component, TensorSpec, TokenEmbedding
from lorgnette.export.layers.norm import RMSNorm
from lorgnette.export.trace import build_module
from lorgnette.quantize.methods import load_method
from lorgnette.quantize.plan import PLANS, QuantPlan, Rule
from lorgnette.quantize.scales import half_scales
from lorgnette.quantize.scheme import QuantScheme
from lorgnette.targets.capabilities import Matrix, SchemeRange
from lorgnette.targets.coreml.build import CHUNK
from lorgnette.targets.coreml.evaluate import Evaluator
from lorgnette.targets.coreml.lowering import MATRICES, TABLES, CoreMl
from lorgnette.targets.coreml.package import read_package
from tests.coreml import Array, lower_one
from tests.small import Call, single, weights_of

COLUMNS = 80
"""Fills no last group of 32, 64 or 128."""
ROWS = 48


def integer_schemes(ranges: tuple[SchemeRange, ...]) -> list[ParameterSet]:
    """All of them; by default those run that differ in more than one number from another."""
    found = {scheme.full_name: scheme for each in ranges for scheme in each.schemes()}
    return [
        pytest.param(scheme, id=name, marks=pytest.mark.slow if _is_rare(scheme) else ())
        for name, scheme in found.items()
        if scheme.is_integer
    ]


def _is_rare(scheme: QuantScheme) -> bool:
    return scheme.scale_bits == 8 or (scheme.group_size in (16, 64) and scheme.symmetric)


def plan_of(scheme: QuantScheme) -> QuantPlan:
    method = "kmeans" if scheme.palette else "rtn"
    return QuantPlan("one", "one scheme for all", (Rule("*", scheme, method),))


def expanded(weight: torch.Tensor, scheme: QuantScheme) -> Array:
    """A matrix as it is stored, float32."""
    made = load_method("kmeans" if scheme.palette else "rtn").quantize(weight.numpy(), scheme)
    made.scales[:] = half_scales(made.scales)
    if made.tables is not None:
        made.tables[:] = made.tables.astype(np.float16)
    return made.dequantize()


def of_width(build: type[nn.Module] | object, width: int, *, name: str = "decoder") -> Component:
    """A component from `[1, 2, width]` to something, without dynamic axes."""
    return single(
        build,  # type: ignore[arg-type]
        (TensorSpec("x", torch.float32, (1, 2, width)),),
        (TensorSpec("y", torch.float32, (1, 2, width)),),
        name=name,
    )


def run_main(path: Path, x: Array, *, exact: bool = True) -> Array:
    return Evaluator(read_package(path), exact=exact).run("main", {"x": x})["y"].astype(np.float32)


@pytest.mark.parametrize("scheme", integer_schemes(MATRICES))
def test_every_promised_scheme_of_a_matrix(tmp_path: Path, scheme: QuantScheme) -> None:
    component = of_width(lambda: nn.Linear(COLUMNS, ROWS), COLUMNS)
    weights = weights_of(component)
    path, built = lower_one(tmp_path, component, weights, plan_of(scheme))
    x = np.eye(COLUMNS, dtype=np.float32)[None, :2] + 0.5
    wanted = x @ expanded(weights["weight"], scheme).T + weights["bias"].half().numpy()
    np.testing.assert_allclose(run_main(path, x), wanted, atol=2e-5)
    assert set(built.weight_bytes) == {"float16", scheme.form}
    scales = 0 if scheme.palette or scheme.per_tensor else ROWS * scheme.groups(COLUMNS)
    planned = scheme.stored_bytes(ROWS, COLUMNS) - scheme.row_scale_bytes(ROWS)
    if scheme.scale_bits == 8:  # scales are float16 all the same
        planned += scales
    assert built.weight_bytes[scheme.form] <= planned


@pytest.mark.parametrize("scheme", integer_schemes(TABLES))
def test_every_promised_scheme_of_a_table(tmp_path: Path, scheme: QuantScheme) -> None:
    component = single(
        lambda: TokenEmbedding(ROWS, COLUMNS),
        (TensorSpec("token_ids", torch.int64, (1, "T")),),
        (TensorSpec("embeddings", torch.float32, (1, "T", COLUMNS)),),
        axes={"T": (1, 64)},
    )
    weights = weights_of(component)
    path, _ = lower_one(tmp_path, component, weights, plan_of(scheme))
    evaluator = Evaluator(read_package(path), exact=True)
    ids = np.arange(CHUNK, dtype=np.int32)[None] % ROWS
    (function,) = {name for name in evaluator.package.functions if not name.endswith("_one")}
    got = evaluator.run(function, {"token_ids": ids})["embeddings"][0]
    wanted = expanded(weights["table.weight"], scheme)[ids[0]]
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-7)


def test_schemes_that_are_not_promised_are_refused_by_name() -> None:
    matrices = [Matrix("decoder", "a.weight", 64, 64, False)]
    for scheme in (QuantScheme(bits=2, group_size=32), QuantScheme(bits=3, group_size=32)):
        (problem,) = CoreMl().check(matrices, plan_of(scheme))
        assert scheme.form in problem
    plan = QuantPlan("one", "", (Rule("*", QuantScheme(bits=16)),), cache_bits=8)
    (problem,) = CoreMl().check(matrices, plan)
    assert "KV cache" in problem


def norm_inputs() -> dict[str, Array]:
    """Residual streams as they are met, `[1, 2, 256]`: float16 numbers all."""
    draw = np.random.default_rng(0).standard_normal((1, 2, 256)).astype(np.float32)
    outlier = draw.copy()
    outlier[..., 7] = 60000.0
    made = {
        "plain": draw,
        "large": 15000 * np.clip(draw, -4, 4),
        "one outlier": outlier,
        "small": 1e-3 * draw,
        "tiny": 1e-6 * draw,
        "zeros": 0 * draw,
    }
    return {name: x.astype(np.float16).astype(np.float32) for name, x in made.items()}


@pytest.mark.parametrize("name", norm_inputs())
@pytest.mark.parametrize("epsilon", [1e-5, 1e-6])
def test_rms_norm_is_safe_in_float16(tmp_path: Path, name: str, epsilon: float) -> None:
    x = norm_inputs()[name]
    component = of_width(lambda: RMSNorm(256, epsilon), 256)
    weights = {"weight": weights_of(component)["weight"].half().float() + 1}
    path, _ = lower_one(tmp_path, component, weights, PLANS["fp16"])
    module = build_module(component)
    module.load_state_dict(weights, assign=True)
    wanted = module(torch.from_numpy(x)).numpy()
    got = run_main(path, x, exact=False)
    assert np.isfinite(got).all()
    largest = np.abs(wanted).max() + 1e-12
    # Below 6e-8 float16 has no numbers, so results of tiny inputs keep few digits.
    assert np.abs(got - wanted).max() <= 4e-3 * largest + 1e-7
    assert np.abs(run_main(path, x) - wanted).max() <= 1e-3 * largest + 1e-7


def test_rms_norm_as_it_is_written_would_overflow() -> None:
    """What the rewriting is for."""
    x = norm_inputs()["large"].astype(np.float16)
    with np.errstate(over="ignore"):
        assert np.isinf(x * x).any()


def test_rms_norm_of_float32_is_torchs(tmp_path: Path) -> None:
    component = of_width(lambda: RMSNorm(256, 1e-6), 256)
    weights = weights_of(component)
    path, _ = lower_one(tmp_path, component, weights, PLANS["fp32"])
    module = build_module(component)
    module.load_state_dict(weights, assign=True)
    for x in norm_inputs().values():
        wanted = module(torch.from_numpy(x)).numpy()
        assert np.abs(run_main(path, x) - wanted).max() <= 2e-6 * np.abs(wanted).max() + 1e-12


def test_quick_gelu_becomes_one_operator(tmp_path: Path) -> None:
    def quick(x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x * 1.702)

    path, built = lower_one(tmp_path, of_width(lambda: Call(quick), 16), {}, PLANS["fp32"])
    assert built.operators == {"gelu": 1}
    x = np.linspace(-4, 4, 32, dtype=np.float32).reshape(1, 2, 16)
    np.testing.assert_allclose(run_main(path, x), quick(torch.from_numpy(x)), atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.sigmoid(x * 1.7),
        lambda x: (x + 1) * torch.sigmoid(x * 1.702),
        lambda x: functional.hardswish(x),
        lambda x: functional.hardsigmoid(x),
        lambda x: x[:, 1:, 3:9],
        lambda x: x.mean(dim=(0, 2), keepdim=True),
    ],
)
def test_what_is_almost_the_same_is_not_joined(tmp_path: Path, function: object) -> None:
    module = Call(function)  # type: ignore[arg-type]
    path, _ = lower_one(tmp_path, of_width(lambda: module, 16), {}, PLANS["fp32"])
    x = np.linspace(-4, 4, 32, dtype=np.float32).reshape(1, 2, 16)
    np.testing.assert_allclose(run_main(path, x), module(torch.from_numpy(x)), atol=1e-6)


def test_operator_without_translation_is_named(tmp_path: Path) -> None:
    component = of_width(lambda: Call(torch.erf), 16)
    with pytest.raises(ConfigError, match=r"aten\.erf\.default.*targets/coreml/operators.py"):
        lower_one(tmp_path, component, {}, PLANS["fp32"])


def test_six_axes_are_refused(tmp_path: Path) -> None:
    component = of_width(lambda: Call(lambda x: x.reshape(1, 2, 2, 2, 2, 2)), 16)
    with pytest.raises(ConfigError, match="too many axes"):
        lower_one(tmp_path, component, {}, PLANS["fp32"])


def test_weight_too_large_for_float16_is_refused(tmp_path: Path) -> None:
    component = of_width(lambda: RMSNorm(16, 1e-6), 16)
    weights = {"weight": torch.full((16,), 1e6)}
    with pytest.raises(ConfigError, match="too large for float16"):
        lower_one(tmp_path, component, weights, PLANS["fp16"])
