"""Palettes against exhaustive search, and what inputs change about them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lorgnette.errors import ConfigError
from lorgnette.quantize.inputs import LayerInputs
from lorgnette.quantize.methods import kmeans, rtn
from lorgnette.quantize.reference.kmeans import least_palette_error, nearest
from lorgnette.quantize.scheme import PALETTE_BITS, QuantScheme, QuantTensor
from tests.unit.quantize_cases import Matrix, correlated, layer_inputs, trained_like

values = (
    st.integers(-16, 16).map(lambda n: n / 8)
    | st.floats(-1, 1, width=32)
    | st.sampled_from([0.0, -0.0, 1e-45, 1e-38, 3.4028235e38, -3.4028235e38])
)
matrices = st.tuples(st.integers(1, 9), st.sampled_from([1, 15, 32, 40])).flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=values)
)


def quantized(
    weight: Matrix, scheme: QuantScheme, inputs: LayerInputs | None = None
) -> QuantTensor:
    """Runs the method; a warning of numpy is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return kmeans.quantize(weight, scheme, inputs)


def palette(bits: int, table_rows: int = 0) -> QuantScheme:
    return QuantScheme(bits=bits, palette=True, table_rows=table_rows)


def squared(weight: Matrix, made: QuantTensor) -> float:
    return float(((made.dequantize().astype(np.float64) - weight) ** 2).sum())


@settings(max_examples=40, deadline=None)
@given(matrices, st.sampled_from(PALETTE_BITS), st.integers(0, 4))
def test_every_weight_gets_the_nearest_value_of_its_rows_table(
    weight: Matrix, bits: int, table_rows: int
) -> None:
    made = quantized(weight, palette(bits, table_rows))
    rows, columns = weight.shape
    together = table_rows or rows
    assert made.tables is not None
    assert made.tables.shape == (-(-rows // together), 2**bits)
    assert made.codes.shape == (rows, columns)
    kinds = [a.dtype for a in (made.codes, made.scales, made.zero_points, made.tables)]
    assert kinds == [np.uint8, np.float32, np.uint8, np.float32]
    assert (made.scales == 1).all()
    assert made.scales.shape == made.zero_points.shape == (rows, 1)
    assert not made.zero_points.any()
    assert (np.diff(made.tables.astype(np.float64)) >= 0).all()
    for (row, column), code in np.ndenumerate(made.codes):
        table = made.tables[row // together].tolist()
        back = float(made.dequantize()[row, column])
        assert back == table[code]
        assert back in {table[one] for one in nearest(float(weight[row, column]), table)}


@settings(max_examples=60, deadline=None)
@given(matrices, st.sampled_from(PALETTE_BITS))
def test_no_more_values_than_a_table_holds_are_kept_exactly(weight: Matrix, bits: int) -> None:
    few = np.unique(weight)[: 2**bits]
    kept = few[np.arange(weight.size) % len(few)].reshape(weight.shape)
    assert np.array_equal(quantized(kept, palette(bits)).dequantize(), kept)


@pytest.mark.parametrize("kind", ["normal", "outliers", "two lumps", "uniform"])
def test_the_error_comes_near_the_least_that_is_possible(kind: str) -> None:
    draw = np.random.default_rng(0)
    weight = draw.standard_normal((2, 40)).astype(np.float32)
    if kind == "outliers":
        weight[:, ::20] *= 12
    elif kind == "two lumps":
        weight = weight * np.float32(0.1) + np.sign(weight)
    elif kind == "uniform":
        weight = draw.random((2, 40)).astype(np.float32)
    least = least_palette_error(weight.ravel().tolist(), [1.0] * weight.size, 16)
    found = squared(weight, quantized(weight, palette(4)))
    assert least * (1 - 1e-5) <= found <= 1.02 * least


def test_the_least_error_is_that_of_all_partitions() -> None:
    """The exact oracle against every way to cut seven values into three runs."""
    draw = np.random.default_rng(1)
    points, counts = np.sort(draw.standard_normal(7)), draw.random(7)

    def cost(part: slice) -> float:
        mean = np.average(points[part], weights=counts[part])
        return float((counts[part] * (points[part] - mean) ** 2).sum())

    brute = min(
        cost(slice(0, a)) + cost(slice(a, b)) + cost(slice(b, 7))
        for a in range(1, 6)
        for b in range(a + 1, 7)
    )
    assert least_palette_error(points.tolist(), counts.tolist(), 3) == pytest.approx(brute)


@pytest.mark.parametrize("bits", PALETTE_BITS)
def test_a_palette_is_better_than_steps_of_the_same_bits(bits: int) -> None:
    weight = trained_like(64, 128)
    plain = squared(weight, rtn.quantize(weight, QuantScheme(bits=bits, per_tensor=True)))
    whole = squared(weight, quantized(weight, palette(bits)))
    by_rows = squared(weight, quantized(weight, palette(bits, 16)))
    assert whole < 0.4 * plain
    assert by_rows < whole


@pytest.mark.parametrize("bits", [4, 6])
def test_values_are_the_means_of_their_weights(bits: int) -> None:
    """Where the rounds have come to rest, with and without inputs."""
    weight = trained_like(8, 100)
    inputs = layer_inputs(correlated(300, 100) * np.linspace(0.1, 3, 100, dtype=np.float32))
    for given_inputs in (None, inputs):
        counts = np.ones(100) if given_inputs is None else np.diagonal(inputs.second_moment)
        made = quantized(weight, palette(bits), given_inputs)
        assert made.tables is not None
        for code in np.unique(made.codes):
            at = made.codes == code
            mean = np.average(weight[at], weights=np.broadcast_to(counts, weight.shape)[at])
            assert made.tables[0, code] == pytest.approx(mean, rel=1e-4, abs=1e-7)


def test_columns_with_large_inputs_count_more() -> None:
    """Outlier channels, weights / 64 and inputs * 64: steps and plain palettes lose them."""
    rows, weight = correlated(512, 128), trained_like(64, 128)
    factor = np.ones(128, np.float32)
    factor[::8] = 64
    twin, inputs = weight / factor, layer_inputs(rows * factor)

    def left(made: QuantTensor) -> float:
        off = made.dequantize().astype(np.float64) - twin
        return float((off**2 @ np.diagonal(inputs.second_moment)).sum())

    plain, weighted = quantized(twin, palette(6)), quantized(twin, palette(6), inputs)
    assert left(weighted) < 0.5 * left(plain)
    assert squared(twin, plain) < squared(twin, weighted)


def test_a_large_matrix_is_seen_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(0).standard_normal((256, 64)).astype(np.float32)
    whole = squared(weight, quantized(weight, palette(6)))
    monkeypatch.setattr(kmeans, "MOST_VALUES", 64 * 64)
    part = squared(weight, quantized(weight, palette(6)))
    assert whole < part < 1.3 * whole


def test_schemes_of_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"int4g32.*palette = true"):
        kmeans.quantize(trained_like(2, 32), QuantScheme(bits=4, group_size=32))
