"""The rivals' formats: errors that are theirs, and bytes that another reader understands."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks.ggml_formats import _pack, _search, q4_0, q4_k, q4_k_m

Array = NDArray[np.float32]


def gaussian(rows: int, columns: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)


def error(got: Array, wanted: Array) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def slowly(block: bytes) -> list[float]:
    """One super-block of 144 bytes, read number by number after the layout of block_q4_K."""
    d, d_min = (float(x) for x in np.frombuffer(block[:4], np.float16))
    six, nibbles = block[4:16], block[16:]
    values = []
    for position in range(256):
        number = position // 32
        if number < 4:
            step, low = six[number] & 63, six[number + 4] & 63
        else:
            step = six[number + 4] & 15 | six[number - 4] >> 6 << 4
            low = six[number + 4] >> 4 | six[number] >> 6 << 4
        byte = nibbles[position // 64 * 32 + position % 32]
        code = byte >> 4 if number % 2 else byte & 15
        values.append(d * step * code - d_min * low)
    return values


@given(st.integers(0, 99), st.floats(-3, 3), st.floats(1e-3, 1e3))
@settings(max_examples=15)
def test_blocks_of_q4_k_are_read_alike_number_by_number(
    seed: int, offset: float, size: float
) -> None:
    weight = ((gaussian(2, 256, seed) + offset) * size).astype(np.float32)
    blocks = weight.reshape(2, 8, 32)
    packed = _pack(blocks, *_search(blocks))
    assert packed.shape == (2, 144)
    wanted = np.array([slowly(row.tobytes()) for row in packed])
    np.testing.assert_allclose(q4_k(weight), wanted, rtol=1e-5, atol=1e-6 * size)
    again = gguf.quants.dequantize(packed, GGMLQuantizationType.Q4_K).reshape(2, 256)
    np.testing.assert_array_equal(q4_k(weight), again)
    assert error(q4_k(weight), weight) < 0.12


@pytest.mark.parametrize("seed", range(4))
def test_q4_k_loses_no_more_than_q4_0_on_normal_weights(seed: int) -> None:
    weight = gaussian(32, 512, seed) * 0.02
    fine, coarse = error(q4_k(weight), weight), error(q4_0(weight), weight)
    assert 0.03 < fine < coarse < 0.11
    shifted = weight + np.float32(0.03)
    assert error(q4_k(shifted), shifted) < 0.7 * error(q4_0(shifted), shifted)


@pytest.mark.parametrize("make", [q4_0, q4_k])
def test_a_second_pass_changes_hardly_anything(make: object) -> None:
    weight = gaussian(16, 512, seed=7)
    once = make(weight)  # type: ignore[operator]
    assert error(make(once), once) < 1e-3  # type: ignore[operator]


def test_rows_that_fill_no_super_block_keep_their_numbers_to_themselves() -> None:
    weight = gaussian(6, 192)
    weight[3] *= 1000
    made = q4_k(weight)
    assert made.shape == (6, 192)
    for row in range(6):
        np.testing.assert_array_equal(made[row : row + 1], q4_k(weight[row : row + 1]))
        assert error(made[row], weight[row]) < 0.1


def test_blocks_of_zeros_stay_zeros() -> None:
    assert not q4_k(np.zeros((2, 256), np.float32)).any()
    weight = gaussian(1, 256)
    weight[:, 64:96] = 0
    assert np.abs(q4_k(weight)[:, 64:96]).max() < 0.05


def test_the_mixture_leaves_to_some_layers_what_gets_more_bits_there() -> None:
    """Of 8 layers, the first, the last, and every third between: 0, 3, 6 and 7."""
    weight = gaussian(48, 256)
    down = [i for i in range(8) if q4_k_m("mlp.down_proj.weight", i, 8, weight, 16) is weight]
    assert down == [0, 3, 6, 7]
    rounded = q4_k(weight)
    for layer in range(8):
        made = q4_k_m("attention.qkv_proj.weight", layer, 8, weight, 16)
        np.testing.assert_array_equal(made[:32], rounded[:32])
        wanted = weight[32:] if layer in down else rounded[32:]
        np.testing.assert_array_equal(made[32:], wanted)
        other = q4_k_m("attention.o_proj.weight", layer, 8, weight, 16)
        np.testing.assert_array_equal(other, rounded)
