"""Scales of 16 and 8 bits: against scalar arithmetic, at the ends of float16."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorgnette.errors import ConfigError
from lorgnette.quantize.methods import rtn
from lorgnette.quantize.scales import half_scales, short_scales, split_scales, whole_scales
from lorgnette.quantize.scheme import Activations, QuantScheme, ScaleBits

LEAST, MOST = 2.0**-24, 65504.0


@given(st.floats(-MOST, MOST, width=32))
def test_a_scale_is_the_nearest_half_and_never_lost(scale: float) -> None:
    (got,) = half_scales(np.array([scale], np.float32)).tolist()
    (nearest,) = struct.unpack("<e", struct.pack("<e", scale))  # which rounds to nearest even
    if nearest or not scale:
        assert got == nearest
    else:
        assert got == math.copysign(LEAST, scale)


def test_a_scale_too_large_for_16_bits_is_told() -> None:
    assert half_scales(np.array([[MOST, -MOST]], np.float32)).tolist() == [[MOST, -MOST]]
    with pytest.raises(ConfigError, match="too large for 16 bits") as caught:
        half_scales(np.array([1, -65520], np.float32))
    assert "65520" in str(caught.value)


BFLOAT_MOST = 65280.0
"""The largest number of 8 significant bits within float16: 255 * 2**8."""


def bits_of(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def float_of(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


TIES = st.tuples(
    st.integers(bits_of(2.0**-14) >> 16, (bits_of(BFLOAT_MOST) >> 16) - 1),
    st.sampled_from([0x7FFF, 0x8000, 0x8001]),
).map(lambda halves: float_of(halves[0] << 16 | halves[1]))
"""Floats halfway between two bfloat16, and those beside them."""


@given(st.floats(2.0**-14, BFLOAT_MOST, width=32) | TIES, st.sampled_from([1, -1]))
def test_a_short_scale_is_the_nearest_bfloat16_ties_to_even(size: float, sign: int) -> None:
    (got,) = short_scales(np.array([sign * size], np.float32)).tolist()
    below = bits_of(size) >> 16  # a bfloat16 is the upper half of a float32
    under, over = float_of(below << 16), float_of(below + 1 << 16)
    if size - under == over - size:
        wanted = under if below % 2 == 0 else over
    else:
        wanted = under if size - under < over - size else over
    assert got == sign * wanted


@given(st.floats(-BFLOAT_MOST, BFLOAT_MOST, width=32))
def test_a_short_scale_is_exact_in_float16_and_in_bfloat16(scale: float) -> None:
    (got,) = short_scales(np.array([scale], np.float32)).tolist()
    assert struct.unpack("<e", struct.pack("<e", got)) == (got,)
    assert bits_of(got) & 0xFFFF == 0
    assert (got == 0) == (scale == 0)
    assert got * scale >= 0
    # Two roundings below the least normal number of float16, one above.
    assert abs(got - scale) <= max(2**-8 * abs(scale), 1.5 * LEAST)
    assert short_scales(np.array([got], np.float32)).tolist() == [got]


def test_short_scales_at_ties_and_at_the_ends() -> None:
    one = 1 + 2.0**-8  # halfway between 1, which is even, and 1 + 2**-7
    three = 1 + 3 * 2.0**-8  # halfway between 1 + 2**-7, which is odd, and 1 + 2**-6
    given_scales = np.array([[one, three, np.nextafter(np.float32(one), 2), -one]], np.float32)
    assert short_scales(given_scales).tolist() == [[1, 1 + 2.0**-6, 1 + 2.0**-7, -1]]
    ends = np.array([BFLOAT_MOST, -BFLOAT_MOST, 2.0**-40, -(2.0**-40), 0], np.float32)
    assert short_scales(ends).tolist() == [BFLOAT_MOST, -BFLOAT_MOST, LEAST, -LEAST, 0]


@pytest.mark.parametrize("scale", [65408.0, MOST, -65536.0, 3e38, math.inf, math.nan])
def test_a_short_scale_too_large_for_float16_is_told(scale: float) -> None:
    with pytest.raises(ConfigError, match="too large for 16 bits"):
        short_scales(np.array([1, scale], np.float32))


def for_groups(
    activations: Activations = "float", scale_bits: ScaleBits = 8, *, symmetric: bool = True
) -> QuantScheme:
    return QuantScheme(
        bits=4,
        group_size=32,
        symmetric=symmetric,
        activations=activations,
        scale_bits=scale_bits,
    )


@given(
    st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=9),
    st.sampled_from([("float", 127), ("int8_group", 127), ("int8_token", 15), ("int8_static", 15)]),
)
def test_scales_of_8_bits_are_whole_multiples_of_a_half(
    scales: list[float], kind: tuple[Activations, int]
) -> None:
    activations, most = kind
    given_scales = np.array([scales], np.float32)
    (got,) = whole_scales(given_scales, for_groups(activations))
    steps, (number,) = split_scales(got[None], most)
    assert np.abs(steps).max() <= most
    assert np.array_equal(steps[0] * number, got)
    largest = max(map(abs, scales))
    # As fine as a half just above the largest allows; never lost, and of the same sign.
    finest = max(largest / most * (1 + 2**-10), LEAST)
    # What is nearly 0 becomes the least multiple.
    for one, other in zip(scales, got.tolist(), strict=True):
        assert (one == 0) == (other == 0)
        assert one * other >= 0
        assert abs(one - other) <= max(0.51 * finest, min(finest * (1 + 2**-9), abs(other)))


def test_multiples_are_found_where_the_largest_is_not_the_most() -> None:
    scales = np.array([[0.5, -3.5, 0], [0, 0, 0], [14, 21, -7]], np.float32)
    steps, number = split_scales(scales, 15)
    assert np.array_equal(steps * number[:, None], scales)
    assert number[1] == 0
    with pytest.raises(ConfigError, match="not whole multiples") as caught:
        split_scales(np.array([[1, 2], [1, 1.03]], np.float32), 15)
    assert "row 1" in str(caught.value)


@pytest.mark.parametrize("scale_bits", [8, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [1e-9, 1e-6, 1.0, 1e4])
def test_codes_are_chosen_for_the_scales_that_are_stored(
    symmetric: bool, size: float, scale_bits: ScaleBits
) -> None:
    weight = np.float32(size) * np.random.default_rng(0).standard_normal((9, 64), np.float32)
    scheme = for_groups(scale_bits=scale_bits, symmetric=symmetric)
    made = rtn.quantize(weight, scheme)
    if scale_bits == 16:
        assert np.array_equal(made.scales.astype(np.float16), made.scales)
        assert not (np.ascontiguousarray(made.scales).view(np.uint32) & 0xFFFF).any()
    else:
        assert np.abs(split_scales(made.scales, 127)[0]).max() <= 127
    off = np.abs(made.dequantize() - weight).reshape(9, 2, 32)
    values = np.arange(16) - made.zero_points[:, :, None].astype(np.float32)
    able = values * made.scales[:, :, None]  # all that the codes of a group can stand for
    least = np.abs(weight.reshape(9, 2, 32, 1) - able[:, :, None]).min(-1)
    assert (off <= least + 1e-6 * np.abs(weight).max()).all()
    assert scheme.form == "int4g32" + ("" if symmetric else "z") + (
        "h" if scale_bits == 16 else "b"
    )
    assert scheme.scale_bytes(9, 64) == 9 * 2 * scale_bits // 8
    assert scheme.row_scale_bytes(9) == (36 if scale_bits == 8 else 0)
