"""What calibration takes down of the inputs of matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from lorgnette.quantize.activations import input_range, round_inputs
from lorgnette.quantize.collect import ROWS, Collector, rescaled
from lorgnette.quantize.inputs import LayerInputs
from lorgnette.quantize.scheme import QuantScheme
from tests.unit.quantize_cases import correlated, layer_inputs

Array = NDArray[np.float32]
WIDTH, INNER = 6, 5
ALL = ("a.weight", "b.weight", "deep.0.weight")


class Net(nn.Module):
    """Two matrices on one tensor, and one on an equal tensor that is another, and on its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.deep = nn.ModuleList([nn.Linear(INNER, 2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.deep[0](self.a(x) * self.b(x))  # type: ignore[no-any-return]


@torch.no_grad()
def collect(rows: Array, sizes: list[int], *, moments: bool = True) -> dict[str, LayerInputs]:
    """Runs the positions in pieces of these sizes, the last piece the rest."""
    net = Net()
    places = np.cumsum(sizes)
    with Collector(net, ALL, moments=moments) as collector:
        for piece in np.split(rows, places[places < len(rows)]):
            net(torch.from_numpy(piece[None]))
            collector.end_of_sample()
    return collector.inputs()


def product(rows: Array) -> Array:
    """What `deep` is given, in numpy."""
    a, b = (
        (getattr(Net(), n).weight.detach().numpy(), getattr(Net(), n).bias.detach().numpy())
        for n in "ab"
    )
    made: Array = (rows @ a[0].T + a[1]) * (rows @ b[0].T + b[1])
    return made


@given(st.integers(1, 2000), st.lists(st.integers(1, 700), max_size=6), st.integers(0, 9))
@settings(max_examples=30)
def test_statistics_are_those_of_all_positions_however_they_came(
    count: int, sizes: list[int], seed: int
) -> None:
    rows = correlated(count, WIDTH, seed)
    found = collect(rows, sizes)
    for name, seen in (("a.weight", rows), ("deep.0.weight", product(rows))):
        wanted = layer_inputs(seen)
        got = found[name]
        assert got.count == count
        for field in ("second_moment", "mean_size", "largest"):
            np.testing.assert_allclose(
                getattr(got, field), getattr(wanted, field), rtol=2e-5, atol=1e-6
            )
        assert got.lowest == pytest.approx(wanted.lowest, rel=1e-5)
        assert got.highest == pytest.approx(wanted.highest, rel=1e-5)
        assert got.second_moment.dtype == got.mean_size.dtype == got.rows.dtype == np.float32
    whole = collect(rows, [])["a.weight"]
    np.testing.assert_array_equal(found["a.weight"].rows, whole.rows)
    np.testing.assert_array_equal(found["a.weight"].largest, whole.largest)


def test_matrices_that_are_given_the_same_tensor_share_what_is_taken_down() -> None:
    found = collect(correlated(40, WIDTH), [7, 7])
    assert found["a.weight"] is found["b.weight"]
    assert found["a.weight"] is not found["deep.0.weight"]
    assert found["deep.0.weight"].rows.shape == (40, INNER)


def test_second_moments_are_left_out_where_no_method_asks_for_them() -> None:
    found = collect(correlated(40, WIDTH), [], moments=False)["a.weight"]
    assert found.second_moment.shape == (0, WIDTH)
    assert found.largest.shape == (WIDTH,)


@pytest.mark.parametrize("count", [1, ROWS - 1, ROWS, ROWS + 1, 5000, 1 << 16])
def test_some_positions_are_kept_in_order_and_from_all_places(count: int) -> None:
    rows = np.arange(count, dtype=np.float32)[:, None].repeat(WIDTH, axis=1)
    kept = collect(rows, [1000] * (count // 1000))["a.weight"].rows[:, 0].astype(int)
    assert (np.diff(kept) > 0).all()
    if count <= ROWS:
        assert kept.tolist() == list(range(count))
        return
    assert ROWS // 2 - 8 <= len(kept) <= ROWS
    # No stretch is left out, and no column of a grid of patches, whose sides are round numbers.
    assert np.diff([0, *kept, count]).max() <= 4 * count / len(kept)
    for width in (8, 9, 16, 27, 32):
        columns = np.bincount(kept % width, minlength=width)
        assert columns.min() > 0.4 * columns.mean()


@torch.no_grad()
def test_hooks_are_taken_off() -> None:
    net = Net()
    collector = Collector(net, ALL, moments=True)
    with collector:
        net(torch.ones(1, 3, WIDTH))
    with pytest.raises(RuntimeError, match="size"), collector:
        net(torch.ones(1, 3, WIDTH + 1))
    seen = collector.inputs()["a.weight"].count
    net(torch.ones(1, 3, WIDTH))
    assert collector.inputs()["a.weight"].count == seen == 3


def test_rescaled_inputs_are_those_of_divided_channels() -> None:
    rows = correlated(300, 16, seed=5)
    factors = np.exp(np.random.default_rng(1).normal(size=16) * 2).astype(np.float32)
    got, wanted = rescaled(layer_inputs(rows), factors), layer_inputs(rows / factors)
    assert got.count == 300
    for field in ("second_moment", "mean_size", "largest", "rows"):
        np.testing.assert_allclose(getattr(got, field), getattr(wanted, field), rtol=1e-5)
    # The range is wide enough for what was kept, and no wider than what was seen allows.
    assert -wanted.largest.max() * 1.0001 <= got.lowest <= wanted.lowest
    assert wanted.highest <= got.highest <= wanted.largest.max() * 1.0001


def ranged(lowest: float, highest: float) -> LayerInputs:
    return layer_inputs(np.array([[lowest, highest]], np.float32))


@given(st.floats(-1e4, 1e4, width=32), st.floats(0, 1e4, width=32))
def test_a_static_range_holds_all_that_was_seen_and_zero_exactly(low: float, width: float) -> None:
    found = input_range(ranged(low, low + width))
    assert 0 <= found.zero_point <= 255
    x = np.array([min(low, 0), 0, max(low + width, 0)])
    codes = np.clip(np.rint(x / found.scale) + found.zero_point, 0, 255)
    back = (codes - found.zero_point) * found.scale
    assert back[1] == 0
    # Half a step for the value and half for the zero point, which is whole.
    assert np.abs(back - x).max() <= 1.001 * found.scale


def test_a_static_range_of_nothing_but_zeros_is_one_of_some_step() -> None:
    found = input_range(ranged(0, 0))
    assert (found.zero_point, found.scale > 0) == (0, True)


@pytest.mark.parametrize(("activations", "width"), [("int8_group", 16), ("int8_token", 40)])
def test_inputs_are_rounded_a_scale_for_each_position_or_group(
    activations: str, width: int
) -> None:
    rows = correlated(20, 40)
    rows[3, :16] = 0
    scheme = QuantScheme(bits=4, group_size=16, activations=activations)  # type: ignore[arg-type]
    got = round_inputs(rows, scheme)
    for position, row in enumerate(rows):
        for start in range(0, 40, width):
            part = row[start : start + width].astype(np.float64)
            step = np.abs(part).max() / 127
            wanted = np.rint(part / step) * step if step else part
            np.testing.assert_allclose(
                got[position, start : start + width], wanted, atol=step * 1e-4
            )


@pytest.mark.parametrize("activations", ["float", "int8_static"])
def test_other_inputs_are_left_alone(activations: str) -> None:
    rows = correlated(20, 40)
    assert round_inputs(rows, QuantScheme(bits=8, activations=activations)) is rows  # type: ignore[arg-type]
