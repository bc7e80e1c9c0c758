"""Hadamard matrices by their definition, and rotations applied without forming them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorgnette.errors import ConfigError
from lorgnette.quantize.methods import rtn
from lorgnette.quantize.rotation import hadamard, random_signs, rotate_columns
from lorgnette.quantize.scheme import QuantScheme
from tests.unit.quantize_cases import correlated, trained_like

WIDTHS = (192, 512, 576, 896, 960, 1536, 2048, 2560)
sizes = st.sampled_from([1, 2, 4, 8, 12, 16, 20, 24, 28, 40, 56, 64, 128, 144, 192, 240, 336, 576])


@settings(deadline=None)
@given(sizes)
def test_rows_are_orthonormal_and_all_elements_alike_but_for_their_sign(n: int) -> None:
    matrix = hadamard(n)
    assert matrix.dtype == np.float32
    assert matrix.shape == (n, n)
    np.testing.assert_allclose(np.abs(matrix), n**-0.5, rtol=1e-6)
    signs = np.sign(matrix).astype(np.int64)
    assert np.array_equal(signs @ signs.T, n * np.eye(n, dtype=np.int64))


@pytest.mark.parametrize("n", WIDTHS)
def test_widths_of_published_models_are_known(n: int) -> None:
    matrix = hadamard(n)
    off = matrix @ matrix.T - np.eye(n, dtype=np.float32)
    assert np.abs(off).max() < 1e-5


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(1, 3), st.integers(1, 5), st.integers(0, 99))
def test_fast_rotation_is_the_product(n: int, blocks: int, rows: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).standard_normal((rows, n * blocks)).astype(np.float32)
    wanted = (matrix.reshape(-1, n).astype(np.float64) @ hadamard(n)).reshape(rows, -1)
    np.testing.assert_allclose(rotate_columns(matrix, n), wanted, atol=2e-6 * n**0.5)


def test_a_writer_and_a_reader_of_a_rotated_stream_give_the_same() -> None:
    write, read, inputs = trained_like(192, 64), trained_like(96, 192, 5), correlated(30, 64)
    wanted = inputs @ write.T @ read.T
    signs = random_signs(192)
    turned_write = rotate_columns(np.ascontiguousarray(write.T) * signs, 192).T
    turned_read = rotate_columns(read * signs, 192)
    np.testing.assert_allclose(inputs @ turned_write.T @ turned_read.T, wanted, atol=1e-6)
    assert set(signs.tolist()) == {-1, 1}
    assert abs(signs.sum()) < 60


def test_rotation_spreads_outlier_channels() -> None:
    """Some inputs times 64, their weights divided by it; 8 bits a position and a row."""
    scheme = QuantScheme(bits=8)
    rows, weight = correlated(256, 192), trained_like(64, 192)
    rows[:, 5::40] *= 64
    weight[:, 5::40] /= 64

    def error(rows: np.ndarray, weight: np.ndarray) -> float:
        scale = np.abs(rows).max(axis=1, keepdims=True) / 127
        rounded = np.rint(rows / scale) * scale
        off = rounded @ rtn.quantize(weight, scheme).dequantize().T - rows @ weight.T
        return float((off**2).sum())

    assert error(rotate_columns(rows, 192), rotate_columns(weight, 192)) < 0.3 * error(rows, weight)


@pytest.mark.parametrize("n", [0, -4, 3, 6, 36, 44, 1100, 2047])
def test_sizes_without_a_known_matrix_are_refused(n: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"got {n}, wanted a power of two times any of 12, 20, 28"
    ):
        hadamard(n)


def test_columns_that_are_no_multiple_are_refused() -> None:
    with pytest.raises(ConfigError, match="got 20, wanted a multiple of 16"):
        rotate_columns(np.ones((2, 20), np.float32), 16)
