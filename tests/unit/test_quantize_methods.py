"""Methods against scalar oracles: asymmetric rounding, the search of steps, half-quadratic."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from lorgnette.errors import ConfigError
from lorgnette.quantize.methods import hqq, load_method, method_names, mse, rtn
from lorgnette.quantize.reference.rounding import (
    least_squared_error,
    root_errors,
    rtn_group_asymmetric,
    squared_errors,
)
from lorgnette.quantize.scheme import GROUP_SIZES, INTEGER_BITS, QuantScheme, QuantTensor

Matrix = NDArray[np.float32]
METHODS = ("hqq", "mse", "rtn")
"""Those that round to steps and need no more than the matrix."""

values = (
    st.integers(-16, 16).map(lambda n: n / 8)
    | st.floats(-1, 1, width=32)
    | st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1e-40, 1e-38, -1.2e-38, 3e38, -3e38, 3.4028235e38])
)
matrices = st.tuples(st.integers(1, 3), st.sampled_from([1, 15, 16, 17, 32, 40, 72])).flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=values)
)
schemes = st.builds(
    QuantScheme,
    bits=st.sampled_from(INTEGER_BITS),
    group_size=st.sampled_from([0, 16, 32]),
    symmetric=st.booleans(),
)


def quantized(method: str, weight: Matrix, scheme: QuantScheme) -> QuantTensor:
    """Runs a method; a warning of numpy is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_method(method).quantize(weight, scheme)


def trained_like(rows: int = 64, columns: int = 128) -> Matrix:
    """Normal weights with a few outliers."""
    draw = np.random.default_rng(3)
    weight = draw.standard_normal((rows, columns)) * 0.02
    weight[draw.random(weight.shape) < 0.005] *= 12
    return weight.astype(np.float32)


def test_the_methods_are_the_files_of_the_folder() -> None:
    names = method_names()
    assert names == sorted([*METHODS, "gptq", "kmeans"])
    assert [name for name in names if load_method(name).NEEDS_INPUTS] == ["gptq"]


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=60, deadline=None)
@given(weight=matrices, scheme=schemes)
def test_whatever_comes_out_is_a_finite_matrix_of_the_scheme(
    method: str, weight: Matrix, scheme: QuantScheme
) -> None:
    made = quantized(method, weight, scheme)
    rows, columns = weight.shape
    last = 2**scheme.bits - 1
    assert made.codes.shape == (rows, scheme.padded(columns))
    assert made.scales.shape == made.zero_points.shape == (rows, scheme.groups(columns))
    kinds = [made.codes.dtype, made.zero_points.dtype, made.scales.dtype]
    assert kinds == [np.uint8, np.uint8, np.float32]
    assert made.codes.max() <= last
    assert made.zero_points.max() <= last
    if scheme.symmetric:
        assert (made.zero_points == (last + 1) // 2).all()
    assert np.isfinite(made.scales).all()
    with np.errstate(over="ignore"):
        assert np.isfinite(made.dequantize()).all()
    # What fills the last group means zero.
    zeros = made.zero_points.repeat(made.codes.shape[1] // made.scales.shape[1], axis=1)
    assert np.array_equal(made.codes[:, columns:], zeros[:, columns:])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [0, *GROUP_SIZES])
def test_blocks_of_rows_do_not_show(
    monkeypatch: pytest.MonkeyPatch, method: str, symmetric: bool, group_size: int
) -> None:
    weight = trained_like(9, 144)
    scheme = QuantScheme(bits=4, group_size=group_size, symmetric=symmetric)
    whole = quantized(method, weight, scheme)
    monkeypatch.setattr("lorgnette.quantize.blocks.BLOCK_ELEMENTS", 300)
    parts = quantized(method, weight, scheme)
    for name in ("codes", "scales", "zero_points"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name)), name


@pytest.mark.parametrize("method", METHODS)
def test_zeros_stay_zeros(method: str) -> None:
    for symmetric in (True, False):
        scheme = QuantScheme(bits=4, group_size=16, symmetric=symmetric)
        weight = trained_like(4, 48)
        weight[:, 16:32] = 0
        weight[2] = 0
        back = quantized(method, weight, scheme).dequantize()
        assert not back[:, 16:32].any()
        assert not back[2].any()
        assert back[0].any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [2.5, -2.5, 3.4e38, -3.4e38, 1e-37])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_constant_group_is_kept(method: str, value: float, symmetric: bool) -> None:
    scheme = QuantScheme(bits=4, group_size=32, symmetric=symmetric)
    weight = np.full((2, 32), value, np.float32)
    np.testing.assert_allclose(quantized(method, weight, scheme).dequantize(), weight, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=30, deadline=None)
@given(weight=matrices, bits=st.sampled_from(INTEGER_BITS), symmetric=st.booleans())
def test_a_whole_matrix_is_rounded_as_one_long_row(
    method: str, weight: Matrix, bits: int, symmetric: bool
) -> None:
    rows, columns = weight.shape
    scheme = QuantScheme(bits=bits, symmetric=symmetric, per_tensor=True)
    made = quantized(method, weight, scheme)
    row = quantized(method, weight.reshape(1, -1), QuantScheme(bits=bits, symmetric=symmetric))
    assert np.array_equal(made.codes.reshape(1, -1), row.codes)
    assert made.scales.tolist() == row.scales.tolist() * rows
    assert made.zero_points.tolist() == row.zero_points.tolist() * rows
    assert made.columns == columns
    assert np.array_equal(made.dequantize().ravel(), row.dequantize().ravel())


@pytest.mark.parametrize("method", METHODS)
def test_palettes_are_refused_by_methods_of_steps(method: str) -> None:
    with pytest.raises(ConfigError, match=r"palette6.*kmeans"):
        quantized(method, trained_like(2, 16), QuantScheme(bits=6, palette=True))


# Asymmetric round to nearest


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(np.float32, (2, 48), elements=values),
    st.sampled_from(INTEGER_BITS),
)
@example(np.zeros((1, 48), np.float32), 4)
@example(np.full((1, 48), -3e38, np.float32), 2)
def test_asymmetric_codes_are_the_oracles(weight: Matrix, bits: int) -> None:
    made = quantized("rtn", weight, QuantScheme(bits=bits, group_size=16, symmetric=False))
    for row in range(len(weight)):
        for group in range(3):
            part = slice(16 * group, 16 * group + 16)
            codes, scale, zero = rtn_group_asymmetric(weight[row, part], bits)
            assert made.codes[row, part].tolist() == codes
            assert made.scales[row, group] == scale
            assert made.zero_points[row, group] == zero


@pytest.mark.parametrize("bits", INTEGER_BITS)
def test_asymmetric_codes_are_exact_at_the_borders(bits: int) -> None:
    """Where the ends of a group are whole steps from zero, they and all codes come back exactly."""
    last = 2**bits - 1
    for zero in (0, 1, last // 2, last):
        steps = (np.arange(16) * last // 15) - zero
        weight = (0.25 * steps[None]).astype(np.float32)
        scheme = QuantScheme(bits=bits, group_size=16, symmetric=False)
        made = quantized("rtn", weight, scheme)
        assert made.zero_points.item() == zero
        assert (made.codes.min(), made.codes.max()) == (0, last)
        np.testing.assert_allclose(made.dequantize(), weight, rtol=1e-6)


@settings(deadline=None)
@given(hnp.arrays(np.float32, (2, 32), elements=st.floats(-100, 100, width=32)))
def test_asymmetric_weights_are_within_half_a_step(weight: Matrix) -> None:
    scheme = QuantScheme(bits=4, group_size=32, symmetric=False)
    made = quantized("rtn", weight, scheme)
    steps = made.scales.astype(np.float64).repeat(32, axis=1)
    error = np.abs(made.dequantize().astype(np.float64) - weight)
    assert (error <= steps / 2 + 1e-4 * steps + 1e-30).all()


# The search of steps


@settings(max_examples=100, deadline=None)
@given(weight=matrices, scheme=schemes)
def test_the_search_is_never_worse_than_round_to_nearest(
    weight: Matrix, scheme: QuantScheme
) -> None:
    found = squared_errors(weight, quantized("mse", weight, scheme))
    plain = squared_errors(weight, quantized("rtn", weight, scheme))
    # Errors are compared in float32 when the search decides.
    total = np.float64(np.abs(weight).max()) ** 2
    assert (found <= plain * (1 + 1e-4) + 1e-12 * total + 1e-80).all()


@pytest.mark.parametrize(("bits", "share"), [(2, 1.03), (3, 1.06), (4, 1.12)])
def test_the_search_comes_near_the_least_error_that_is_possible(bits: int, share: float) -> None:
    weight = trained_like(24, 32)
    scheme = QuantScheme(bits=bits, group_size=32)
    found = squared_errors(weight, quantized("mse", weight, scheme))[:, 0]
    plain = squared_errors(weight, quantized("rtn", weight, scheme))[:, 0]
    least = np.array([least_squared_error(row, bits, 2 ** (bits - 1)) for row in weight])
    assert (found >= least * (1 - 1e-5)).all()
    assert found.sum() <= share * least.sum()
    assert found.sum() <= 0.95 * plain.sum()


def test_the_least_error_is_that_of_a_search_without_end() -> None:
    """The exact oracle against brute force over a hundred thousand scales."""
    draw = np.random.default_rng(5)
    group = draw.standard_normal(8).astype(np.float32)
    scales = np.concatenate([np.linspace(-3, -1e-3, 50_000), np.linspace(1e-3, 3, 50_000)])
    codes = np.clip(np.rint(group[None] / scales[:, None]), -2, 1)
    brute = ((codes * scales[:, None] - group) ** 2).sum(axis=1).min()
    assert least_squared_error(group, 2, 2) == pytest.approx(brute, rel=1e-3)
    assert least_squared_error(group, 2, 2) <= brute


@pytest.mark.parametrize("symmetric", [True, False])
def test_no_group_of_many_is_worse_than_by_round_to_nearest(symmetric: bool) -> None:
    """Of 8 bits the steps tried alone would be worse in every sixth group."""
    weight = np.random.default_rng(0).standard_normal((200, 128)).astype(np.float32)
    scheme = QuantScheme(bits=8, group_size=16, symmetric=symmetric)
    found = squared_errors(weight, quantized("mse", weight, scheme))
    assert (found <= squared_errors(weight, quantized("rtn", weight, scheme)) * 1.0001).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_helps_most_where_there_are_outliers(symmetric: bool) -> None:
    """One outlier takes all codes from the others, unless there is a scale of its own for it."""
    scheme = QuantScheme(bits=2, group_size=128, symmetric=symmetric)
    weight = np.random.default_rng(0).standard_normal((16, 128)).astype(np.float32)
    weight[:, 7] = 6
    found = squared_errors(weight, quantized("mse", weight, scheme)).sum()
    assert found < 0.75 * squared_errors(weight, quantized("rtn", weight, scheme)).sum()


# Half-quadratic


@settings(max_examples=100, deadline=None)
@given(weight=matrices, scheme=schemes)
def test_half_quadratic_never_raises_its_objective(weight: Matrix, scheme: QuantScheme) -> None:
    found = root_errors(weight, quantized("hqq", weight, scheme))
    plain = root_errors(weight, quantized("rtn", weight, scheme))
    # Roots make much of the last digit of float32.
    slack = 3e-3 * np.sqrt(np.abs(weight.astype(np.float64)).max()) * scheme.padded(weight.shape[1])
    assert (found <= plain + slack + 1e-20).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "share"), [(2, 0.95), (3, 0.96), (4, 0.99)])
def test_half_quadratic_lowers_its_objective(bits: int, share: float, symmetric: bool) -> None:
    weight = trained_like()
    scheme = QuantScheme(bits=bits, group_size=64, symmetric=symmetric)
    found = root_errors(weight, quantized("hqq", weight, scheme))
    plain = root_errors(weight, quantized("rtn", weight, scheme))
    assert (found <= plain * (1 + 1e-4)).all()
    assert found.sum() < share * plain.sum()


@given(hnp.arrays(np.float32, (1, 1, 8), elements=st.floats(-4, 4, width=32)))
def test_shrinkage_is_the_formula(off: NDArray[np.float32]) -> None:
    got = hqq.shrink(off, np.float32(10))
    for value, found in zip(off.ravel(), got.ravel(), strict=True):
        size = abs(float(value))
        wanted = max(size - size**-0.5 / 10, 0) if size else 0
        assert found == pytest.approx(np.copysign(wanted, value), abs=1e-4)


# What an export waits for


@pytest.mark.parametrize("method", ["mse", "hqq"])
def test_a_method_holds_no_more_than_a_few_blocks(method: str) -> None:
    """Beside the matrix and its result only small arrays are made."""
    import tracemalloc

    weight = trained_like(2048, 512)
    scheme = QuantScheme(bits=4, group_size=32)
    quantized(method, weight[:8], scheme)
    tracemalloc.start()
    made = quantized(method, weight, scheme)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    result = made.codes.nbytes + made.scales.nbytes + made.zero_points.nbytes
    assert peak < result + 6e6


def test_the_search_finds_a_step_that_is_there() -> None:
    """Weights that are whole steps, the largest of them one code short of the end."""
    steps = np.array([-6, -7, 5, 4, 3, -3, 2, 1, -1, 0, 0, 1, -2, 7, -5, 6], np.float32)
    weight = 0.1 * steps[None]
    scheme = QuantScheme(bits=4, group_size=16)
    assert np.abs(mse.quantize(weight, scheme).dequantize() - weight).max() < 1e-6
    assert np.abs(rtn.quantize(weight, scheme).dequantize() - weight).max() > 0.02
