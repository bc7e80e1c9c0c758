"""Round to nearest against a scalar oracle, packing, and the plans."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from lorgnette.errors import EXIT_WRONG_INPUT, ConfigError
from lorgnette.quantize.methods import load_method, mse, rtn
from lorgnette.quantize.plan import PLANS, QuantPlan, Rule, find_plan
from lorgnette.quantize.reference.rounding import rtn_group
from lorgnette.quantize.scheme import FLOAT16, FLOAT32, QuantScheme
from lorgnette.targets.onnx.packing import pack_codes

Matrix = NDArray[np.float32]
GROUP = 32
INT8 = QuantScheme(bits=8, group_size=GROUP)
INT4 = QuantScheme(bits=4, group_size=GROUP)

# Multiples of a power of two make ties; the rest are the ends of float32.
values = (
    st.integers(-16, 16).map(lambda n: n / 8)
    | st.floats(-1, 1, width=32)
    | st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1e-40, 1e-38, -1.2e-38, 3e38, -3e38, 3.4028235e38])
)
matrices = st.tuples(st.integers(1, 3), st.sampled_from([1, 31, 32, 33, 64, 72])).flatmap(
    lambda shape: hnp.arrays(np.float32, shape, elements=values)
)
schemes = st.sampled_from([INT8, INT4])


@settings(max_examples=150)
@given(matrices, schemes)
@example(np.zeros((2, 32), np.float32), INT4)
@example(np.array([[-8.0, 7.5, 6.5, 5.5, -0.5, 0.5]], np.float32), INT4)
@example(np.array([[2.0, -2.0], [-2.0, 2.0]], np.float32), INT8)
def test_codes_and_scales_are_the_oracles(weight: Matrix, scheme: QuantScheme) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = rtn.quantize(weight, scheme)
    rows, columns = weight.shape
    groups = -(-columns // GROUP)
    assert made.codes.shape == (rows, groups * GROUP)
    assert made.scales.shape == (rows, groups)
    assert made.codes.dtype == np.uint8
    assert made.scales.dtype == np.float32
    assert made.columns == columns
    assert (made.zero_points == 2 ** (scheme.bits - 1)).all()
    for row in range(rows):
        for group in range(groups):
            part = np.zeros(GROUP, np.float32)
            given_part = weight[row, group * GROUP : (group + 1) * GROUP]
            part[: len(given_part)] = given_part
            codes, scale = rtn_group(part, scheme.bits)
            got = made.codes[row, group * GROUP : (group + 1) * GROUP]
            assert got.tolist() == codes
            assert made.scales[row, group] == scale


@settings(max_examples=200)
@given(matrices, schemes)
def test_every_weight_is_within_half_a_step(weight: Matrix, scheme: QuantScheme) -> None:
    """The last code on the far side may be a whole step away, and tiny groups become zero."""
    made = rtn.quantize(weight, scheme)
    back = made.dequantize()
    assert back.shape == weight.shape
    assert back.dtype == np.float32
    columns = weight.shape[1]
    steps = np.abs(made.scales.astype(np.float64)).repeat(GROUP, axis=1)[:, :columns]
    last = made.codes[:, :columns] == 2**scheme.bits - 1
    error = np.abs(back.astype(np.float64) - weight)
    slack = 2.0**-20 * np.abs(weight.astype(np.float64)) + 2.0**-120
    assert (error <= np.where(last, steps, steps / 2) + slack).all()


@given(hnp.arrays(np.float32, (1, GROUP), elements=st.floats(-100, 100, width=32)), schemes)
def test_the_largest_weight_survives(weight: Matrix, scheme: QuantScheme) -> None:
    largest = max(weight[0], key=lambda value: (abs(value), value))  # of two alike the positive
    back = rtn.quantize(weight, scheme).dequantize()
    # A scale of 8 bits whose inverse overflows is none: the weight is below 128 / 3.4e38.
    assert np.abs(back - largest).min() <= 1e-6 * abs(largest) + 4e-37


def test_columns_beyond_the_weight_mean_zero() -> None:
    weight = np.full((2, 33), 5.0, np.float32)
    made = rtn.quantize(weight, INT4)
    assert (made.codes[:, 33:] == 8).all()
    assert np.allclose(made.dequantize(), weight)


@given(
    st.sampled_from([2, 4, 8]).flatmap(
        lambda bits: st.tuples(
            st.just(bits),
            hnp.arrays(
                np.uint8,
                st.tuples(st.integers(1, 4), st.integers(1, 40)),
                elements=st.integers(0, 2**bits - 1),
            ),
        )
    )
)
def test_packing_round_trip(case: tuple[int, NDArray[np.uint8]]) -> None:
    bits, codes = case
    packed = pack_codes(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (codes.shape[0], -(-codes.shape[1] * bits // 8))
    for (row, column), code in np.ndenumerate(codes):
        # Bit by bit: code c of a row starts at bit c * bits of the row, low bits first.
        start = column * bits
        assert (int(packed[row, start // 8]) >> (start % 8)) & (2**bits - 1) == code


@given(
    st.sampled_from([INT8, INT4, QuantScheme(bits=4, group_size=128)]),
    st.integers(1, 9),
    st.integers(1, 300),
)
def test_stored_bytes(scheme: QuantScheme, rows: int, columns: int) -> None:
    made = rtn.quantize(np.ones((rows, columns), np.float32), scheme)
    stored = pack_codes(made.codes, scheme.bits).nbytes + made.scales.nbytes
    assert scheme.stored_bytes(rows, columns) == stored


def test_stored_bytes_of_floats() -> None:
    assert FLOAT32.stored_bytes(1, 7) == 28
    assert FLOAT16.stored_bytes(1, 7) == 14
    assert INT4.stored_bytes(1, 64) == 32 + 8
    assert [s.is_integer for s in (FLOAT32, FLOAT16, INT8, INT4)] == [False, False, True, True]


@pytest.mark.parametrize(
    ("plan", "component", "bits", "rounded"),
    [
        ("fp32", "decoder", 32, False),
        ("fp16", "vision_encoder", 16, False),
        ("int8", "vision_encoder", 8, True),
        ("int8", "decoder", 8, True),
        ("int8", "token_embedding", 8, True),
        ("int8-channel", "vision_encoder", 8, True),
        ("int8-channel", "decoder", 8, True),
        ("int8-channel", "token_embedding", 8, True),
        ("int4", "vision_encoder", 8, True),
        ("int4", "decoder", 4, True),
        ("int4", "token_embedding", 4, True),
    ],
)
def test_plans(plan: str, component: str, bits: int, rounded: bool) -> None:
    scheme = find_plan(plan).scheme_for(component, "layers.0.mlp.fc1.weight")
    assert (scheme.bits, scheme.activations != "float") == (bits, rounded)


@pytest.mark.parametrize("plan", ["int8", "int8-channel", "int4"])
def test_vision_is_rounded_by_position_but_for_pixels_and_gates(plan: str) -> None:
    def activations(parameter: str) -> str:
        return find_plan(plan).scheme_for("vision_encoder", f"{parameter}.weight").activations

    for name in ("tower.layers.11.attention.q_proj", "tower.layers.0.mlp.fc2", "projector.mlp.fc1"):
        assert activations(name) == "int8_token"
    assert activations("tower.embed.projection") == "float"
    assert activations("projector.block1.gate.fc2") == "float"
    assert activations("projector.block1.pointwise") == "int8_token"


def test_int8_by_channel_has_no_groups_where_inputs_are_multiplied() -> None:
    plan = find_plan("int8-channel")
    for name in (
        "head.weight",
        "layers.0.attention.q_proj.weight",
        "layers.3.mlp.down_proj.weight",
    ):
        scheme = plan.scheme_for("decoder", name)
        assert (scheme.bits, scheme.group_size, scheme.activations) == (8, 0, "int8_token")
        assert scheme.symmetric
    # Rows of the table are gathered, so that groups cost nothing there.
    assert plan.scheme_for("token_embedding", "weight").group_size == 32
    assert plan.needs_samples


def test_unknown_plan_lists_the_known() -> None:
    with pytest.raises(ConfigError) as caught:
        find_plan("int3")
    assert caught.value.exit_code == EXIT_WRONG_INPUT
    for part in ("'int3'", *PLANS):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["gptq2", "../rtn", "rtn.quantize", ""])
def test_unknown_method(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown quantisation method"):
        load_method(name)


def test_each_rule_uses_its_method() -> None:
    weight = np.random.default_rng(0).standard_normal((2, 32), dtype=np.float32)
    rules = (Rule("a/*", INT4), Rule("b/*", INT4, "mse"), Rule("c/*", INT4, "other"))
    plan = QuantPlan("p", "", rules)
    assert np.array_equal(plan.quantize("a", "w", weight).codes, rtn.quantize(weight, INT4).codes)
    assert np.array_equal(plan.quantize("b", "w", weight).codes, mse.quantize(weight, INT4).codes)
    with pytest.raises(ConfigError, match="unknown quantisation method"):
        plan.quantize("c", "w", weight)
    with pytest.raises(ConfigError, match="no rule selects the matrix 'd/w'"):
        plan.quantize("d", "w", weight)


def test_the_first_rule_that_fits_decides() -> None:
    plan = QuantPlan("p", "", (Rule("a/x*", INT8), Rule("a/*", INT4), Rule("*", FLOAT16)))
    told = [plan.scheme_for(*key) for key in (("a", "xy"), ("a", "y"), ("b", "xy"))]
    assert told == [INT8, INT4, FLOAT16]
    assert plan.find_rule("a", "x") is plan.rules[0]
    assert QuantPlan("p", "", plan.rules[:2]).find_rule("b", "x") is None
