"""Narrow codes: 8 bits of which half the range is used, so that two products fit 16 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lorgnette.errors import ConfigError
from lorgnette.quantize.methods import load_method
from lorgnette.quantize.plan import PLANS
from lorgnette.quantize.plan_file import build_plan, read_plan_file
from lorgnette.quantize.plan_text import rule_text
from lorgnette.quantize.scheme import QuantScheme
from lorgnette.targets import all_targets
from tests.unit.quantize_cases import correlated, layer_inputs, trained_like

NARROW = QuantScheme(bits=8, activations="int8_token", narrow=True)
WIDE = QuantScheme(bits=8, activations="int8_token")
METHODS = ("rtn", "mse", "hqq", "gptq")


@pytest.mark.parametrize("method", METHODS)
def test_no_code_is_farther_than_64_from_zero(method: str) -> None:
    weight, inputs = trained_like(), layer_inputs(correlated(512, 128))
    made = load_method(method).quantize(weight, NARROW, inputs)
    assert (made.zero_points == 128).all()
    assert made.codes.min() >= 64
    assert made.codes.max() <= 192
    # The range that is there is used by every row.
    reach = np.abs(made.codes.astype(int) - 128).max(axis=1)
    assert (reach >= (64 if method == "rtn" else 40)).all()
    # Half as many steps: about twice the error.
    wide = load_method(method).quantize(weight, WIDE, inputs)
    errors = [np.linalg.norm(one.dequantize() - weight) for one in (made, wide)]
    assert 1.7 < errors[0] / errors[1] < 2.3


def test_nearest_codes_are_those_of_a_scale_that_takes_the_largest_to_64() -> None:
    weight = trained_like(8, 40)
    made = load_method("rtn").quantize(weight, NARROW)
    for row, codes, scale in zip(weight, made.codes, made.scales[:, 0], strict=True):
        largest = row[np.abs(row).argmax()]
        assert scale == pytest.approx(largest / -64)
        assert codes.tolist() == [128 + round(float(value) / float(scale)) for value in row]


def test_two_products_with_bytes_fit_16_bits() -> None:
    least, most = (NARROW.first - NARROW.middle), (NARROW.last - NARROW.middle)
    assert (least, most) == (-64, 64)
    assert 2 * 255 * least >= -(2**15)
    assert 2 * 255 * most < 2**15
    # Those of all 8 bits do not.
    assert 2 * 255 * (WIDE.last - WIDE.middle) >= 2**15


def test_every_target_of_codes_by_channel_carries_them() -> None:
    for target in all_targets().values():
        same = target.capabilities.carries(WIDE, gathered=False)
        assert target.capabilities.carries(NARROW, gathered=False) == same


def test_the_vision_encoders_of_the_int4_plans_are_narrow() -> None:
    for name, plan in PLANS.items():
        scheme = plan.scheme_for("vision_encoder", "tower.layers.0.mlp.fc1.weight")
        assert scheme.narrow == name.startswith("int4"), name


RULE = '[[rule]]\nselect = "*"\nbits = {bits}\ngroup = {group}\nnarrow = true\n'


def plan_text(bits: int, group: str, more: str = "") -> str:
    return 'name = "p"\n' + RULE.format(bits=bits, group=group) + more


def test_a_plan_file_may_ask_for_them(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(plan_text(8, '"channel"', 'activations = "int8_token"\n'))
    (rule,) = read_plan_file(path).rule
    assert rule.narrow is True
    (made,) = build_plan(read_plan_file(path), "p.toml").rules
    assert made.scheme == NARROW
    assert made.scheme.form == "int8cn"
    assert rule_text(made).narrow is True


@pytest.mark.parametrize(
    "text",
    [
        plan_text(4, '"channel"'),
        plan_text(8, "32"),
        plan_text(8, '"channel"', "symmetric = false\n"),
        'name = "p"\n[[rule]]\nselect = "*"\nbits = 32\nnarrow = true\n',
        'name = "p"\n[[rule]]\nselect = "*"\nbits = 8\npalette = true\nnarrow = true\n',
    ],
)
def test_a_plan_file_may_ask_only_for_what_there_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="'narrow'"):
        read_plan_file(path)
