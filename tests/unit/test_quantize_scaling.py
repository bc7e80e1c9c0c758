"""AWQ, SmoothQuant and its part for outliers against loops over numbers, and what they undo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lorgnette.errors import ConfigError
from lorgnette.quantize.methods import rtn
from lorgnette.quantize.reference.scaling import awq_factors, smoothquant_factors
from lorgnette.quantize.scaling import awq, load_scaling, scaling_names, smoothquant
from lorgnette.quantize.scaling.site import SiteWeights
from lorgnette.quantize.scheme import QuantScheme
from tests.unit.quantize_cases import Matrix, correlated, layer_inputs, trained_like

INT4 = QuantScheme(bits=4, group_size=16)
NAMES = ("awq", "outliers", "smoothquant")


def rounding(scheme: QuantScheme) -> Callable[[Matrix, int], Matrix]:
    """To nearest, whichever consumer."""
    return lambda matrix, _: rtn.quantize(matrix, scheme).dequantize()


def int8_token(rows: Matrix) -> Matrix:
    """Rounds each position to 8 bits by its largest element."""
    scale = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
    rounded: Matrix = np.rint(rows / scale) * scale
    return rounded


def site(
    consumers: tuple[Matrix, ...],
    rows: Matrix,
    channel_of_column: NDArray[np.int64] | None = None,
    scheme: QuantScheme = INT4,
) -> SiteWeights:
    if channel_of_column is None:
        channel_of_column = np.arange(rows.shape[1])
    return SiteWeights(consumers, channel_of_column, layer_inputs(rows), rounding(scheme))


def error(one: SiteWeights, factors: Matrix) -> float:
    """What rounding under factors does to the outputs."""
    outputs = tuple(one.inputs.rows @ matrix.T for matrix in one.consumers)
    return awq.output_error(one, factors, outputs)


def rescaled(one: SiteWeights, rows: Matrix, factor: Matrix) -> SiteWeights:
    """The same outputs from inputs times a factor and weights divided by it."""
    by_column = factor[one.channel_of_column]
    return replace(
        one,
        consumers=tuple(matrix / by_column for matrix in one.consumers),
        inputs=layer_inputs(rows * by_column),
    )


def test_the_methods_are_the_files_of_the_folder() -> None:
    assert scaling_names() == list(NAMES)
    assert load_scaling("awq").factors is awq.factors
    for name in ("site", "none", "../awq", ""):
        with pytest.raises(
            ConfigError, match=r"unknown scaling method.*awq, outliers, smoothquant"
        ):
            load_scaling(name)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 12),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1.0, 0.7]),
    st.integers(0, 99),
)
def test_factors_are_the_oracles(
    consumers: int, channels: int, repeat: int, keep: float, seed: int
) -> None:
    """Of one or more consumers, channels of one or more columns, some of them dead."""
    draw = np.random.default_rng(seed)
    columns = channels * repeat
    of_column = np.tile(np.arange(channels), repeat)
    matrices = [
        draw.standard_normal((int(draw.integers(1, 4)), columns)).astype(np.float32)
        for _ in range(consumers)
    ]
    rows = (correlated(6, columns, seed) * 10.0 ** draw.integers(-1, 2, columns)).astype(np.float32)
    rows[:, draw.random(columns) > keep] = 0
    for matrix in matrices:
        matrix[:, draw.random(columns) > keep] = 0
    one = site(tuple(matrices), rows, of_column)

    def rounded(row: list[float]) -> list[float]:
        back = rtn.quantize(np.array([row], np.float32), INT4).dequantize()[0]
        return [float(value) for value in back]

    lists = [matrix.tolist() for matrix in matrices]
    wanted = smoothquant_factors(rows.tolist(), lists, of_column.tolist(), 0.5)
    np.testing.assert_allclose(smoothquant.factors(one), wanted, rtol=1e-5)
    best = awq_factors(rows.tolist(), lists, of_column.tolist(), awq.SHARES, rounded)
    found = awq.factors(one)
    # Two candidates can come out alike.
    if not np.allclose(found, best, rtol=1e-5):
        oracle = error(one, np.array(best, np.float32))
        assert error(one, found) == pytest.approx(oracle, rel=1e-3, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.sampled_from([1, 3]), st.integers(0, 99))
def test_smoothing_follows_a_rescale_of_channels_exactly(
    migration: float, repeat: int, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    of_column = np.repeat(np.arange(20), repeat)
    rows = correlated(64, len(of_column), seed)
    one = site((trained_like(8, len(of_column)),), rows, of_column)
    factor = (2.0 ** draw.integers(-5, 6, 20)).astype(np.float32)
    twin = rescaled(one, rows, factor)
    ratio = smoothquant.factors(twin, migration) / (smoothquant.factors(one, migration) * factor)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)


@pytest.mark.parametrize("repeat", [1, 4])
def test_activation_aware_scaling_follows_a_rescale_of_channels_exactly(repeat: int) -> None:
    draw = np.random.default_rng(0)
    of_column = np.repeat(np.arange(32), repeat)
    rows = correlated(512, len(of_column)) * draw.lognormal(0, 1, len(of_column)).astype(np.float32)
    one = site(
        (trained_like(24, len(of_column)), trained_like(40, len(of_column))), rows, of_column
    )
    factor = (2.0 ** draw.integers(-5, 6, 32)).astype(np.float32)
    twin = rescaled(one, rows, factor)
    first, second = awq.factors(one), awq.factors(twin)
    assert (first != 1).any()
    ratio = second / (first * factor)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    assert error(twin, second) == pytest.approx(error(one, first), rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [3, 4])
def test_outlier_channels_are_undone(name: str, bits: int) -> None:
    """Some inputs times 64 and their weights divided by it: rounding alone loses them."""
    scheme = QuantScheme(bits=bits, group_size=32)
    rows = correlated(512, 128)
    one = site((trained_like(64, 128), trained_like(64, 128, 9)), rows, scheme=scheme)
    factor = np.ones(128, np.float32)
    factor[::8] = 64
    twin, nothing = rescaled(one, rows, factor), np.ones(128, np.float32)
    factors = load_scaling(name).factors(twin)
    assert error(twin, nothing) > 2 * error(one, nothing)
    assert error(twin, factors) < 1.1 * error(one, nothing)


@pytest.mark.parametrize("name", NAMES)
def test_outlier_inputs_can_be_rounded_after_scaling(name: str) -> None:
    """Of 8 bits a position, the largest channel takes all from the others."""
    scheme = QuantScheme(bits=8)
    rows = correlated(512, 128)
    one = replace(site((trained_like(64, 128),), rows, scheme=scheme), round_inputs=int8_token)
    factor = np.ones(128, np.float32)
    factor[7] = 100
    twin, nothing = rescaled(one, rows, factor), np.ones(128, np.float32)
    factors = load_scaling(name).factors(twin)
    assert error(twin, nothing) > 100 * error(one, nothing)
    assert error(twin, factors) < 2 * error(one, nothing)


def test_only_channels_that_stand_out_are_rescaled() -> None:
    rows = correlated(512, 128)
    one = site((trained_like(64, 128),), rows)
    plain = load_scaling("outliers").factors(one)
    smooth = smoothquant.factors(one)
    inside = (smooth > 0.25) & (smooth < 4)
    assert inside.mean() > 0.9
    assert (plain[inside] == 1).all()
    factor = np.ones(128, np.float32)
    factor[[5, 70]] = (64, 1 / 64)
    found = load_scaling("outliers").factors(rescaled(one, rows, factor))
    standing = np.flatnonzero(found != 1)
    assert {5, 70} <= set(standing.tolist())
    wanted = smoothquant.factors(rescaled(one, rows, factor))
    np.testing.assert_array_equal(found[standing], wanted[standing])


def test_scaling_is_left_out_where_it_does_not_help() -> None:
    """Weights that are codes already: any other step can only lose."""
    draw = np.random.default_rng(0)
    codes = draw.integers(-8, 8, (32, 64))
    codes[:, ::16] = -8
    rows = (correlated(512, 64) * draw.lognormal(0, 1, 64)).astype(np.float32)
    one = site((codes.astype(np.float32),), rows)
    assert (awq.factors(one) == 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_factors_are_bounded_and_channels_without_inputs_or_weights_keep_theirs(name: str) -> None:
    weight, rows = trained_like(16, 32), correlated(256, 32)
    rows[:, 3] = 0
    weight[:, 5] = 0
    rows[:, 8] *= 1e10
    rows[:, 9] *= 1e-10
    found = load_scaling(name).factors(site((weight,), rows))
    assert found.dtype == np.float32
    assert (found[3], found[5]) == (1, 1)
    assert (found >= 0.99e-4).all()
    assert (found <= 1.01e4).all()
    dead = load_scaling(name).factors(site((weight,), rows * 0))
    assert dead.tolist() == [1.0] * 32
