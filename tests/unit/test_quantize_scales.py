"""Scales of 16 bits: against scalar arithmetic, at the ends of float16."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorgnette.errors import ConfigError
from lorgnette.quantize.methods import rtn
from lorgnette.quantize.scheme import QuantScheme, half_scales

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


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [1e-9, 1e-6, 1.0, 1e4])
def test_codes_are_chosen_for_the_scales_that_are_stored(symmetric: bool, size: float) -> None:
    weight = np.float32(size) * np.random.default_rng(0).standard_normal((9, 64), np.float32)
    scheme = QuantScheme(bits=4, group_size=32, symmetric=symmetric, scale_bits=16)
    made = rtn.quantize(weight, scheme)
    assert np.array_equal(made.scales.astype(np.float16), made.scales)
    off = np.abs(made.dequantize() - weight).reshape(9, 2, 32)
    values = np.arange(16) - made.zero_points[:, :, None].astype(np.float32)
    able = values * made.scales[:, :, None]  # all that the codes of a group can stand for
    least = np.abs(weight.reshape(9, 2, 32, 1) - able[:, :, None]).min(-1)
    assert (off <= least + 1e-6 * np.abs(weight).max()).all()
    assert scheme.form == ("int4g32h" if symmetric else "int4g32zh")
    assert scheme.scale_bytes(9, 64) == 9 * 2 * 2
