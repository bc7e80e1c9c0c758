"""Matrices on integer kernels: against exact integer arithmetic, on both engines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lorgnette.errors import ConfigError
from lorgnette.export.component import TensorSpec
from lorgnette.export.reference import _rounding
from lorgnette.quantize.methods import rtn
from lorgnette.quantize.plan import QuantPlan, Rule
from lorgnette.quantize.scheme import QuantScheme
from lorgnette.targets.onnx.lowering import OnnxCpu
from tests.rounding import rounded
from tests.small import Array, Lowered, draw, lower, of_width, session, single, weights_of

SCHEME = QuantScheme(bits=8, activations="int8_token")
PLAN = QuantPlan("one", "one scheme for all", (Rule("*", SCHEME),))


def by_integers(x: Array, weight: Array) -> Array:
    """The product of rounded rows and rounded weights: sums in int64, scales in float64.

    Shapes: `[..., K]` and `[N, K]` to `[..., N]`.
    """
    largest = np.abs(x).max(-1, keepdims=True)
    scale = np.maximum(largest / np.float32(127), np.float32(1e-30))
    codes = np.rint(x / scale).astype(np.int64)
    assert np.abs(codes).max() <= 127
    made = rtn.quantize(weight, SCHEME)
    product = codes @ (made.codes.astype(np.int64) - 128).T
    return np.asarray(product * scale.astype(np.float64) * made.scales[:, 0].astype(np.float64))


def twin(lowered: Lowered) -> Lowered:
    """The same graph without rounding."""
    graph = lowered.folder / lowered.report.graph
    OnnxCpu().write_exact(graph, graph.with_name("exact.onnx"))
    return Lowered(lowered.folder, lowered.report, session(graph.with_name("exact.onnx")))


def close(got: Array, wanted: Array, size: float) -> bool:
    """Whether two agree but for the rounding of float32 products."""
    return bool(np.abs(got - wanted).max() <= 1e-6 * max(size, 1e-30))


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 200),
    st.integers(1, 40),
    st.integers(1, 20),
    st.sampled_from([1.0, 1e-20, 1e6]),
)
@example(33, 5, 7, 1.0)
@example(1, 1, 1, 1.0)
@example(4304, 3, 2, 1.0)
def test_any_shape_is_what_integers_give(columns: int, rows: int, length: int, size: float) -> None:
    """Rows of zeros, outlier channels and weights of zero among them."""
    generator = np.random.default_rng(columns * 1000 + rows)
    component = of_width(lambda: nn.Linear(columns, rows), columns)
    weights = weights_of(component, seed=columns)
    weights["weight"][rows // 2] = 0
    x = np.float32(size) * generator.standard_normal((1, length, columns), dtype=np.float32)
    x[:, length // 2] = 0
    x[..., columns // 3] *= 50
    with TemporaryDirectory() as folder:
        lowered = lower(Path(folder), component, weights, PLAN)
        matrix = weights["weight"].numpy()
        bias = weights["bias"].numpy()
        got = lowered.run(x)[0]
        largest = float(np.abs(by_integers(np.abs(x), np.abs(matrix))).max() + np.abs(bias).max())
        assert close(got, by_integers(x, matrix) + bias, largest)
        assert np.array_equal(got[:, length // 2], np.broadcast_to(bias, got[:, 0].shape))
        exact = twin(lowered).run(x)[0]
        made = rtn.quantize(matrix, SCHEME).dequantize().astype(np.float64)
        assert close(exact, x.astype(np.float64) @ made.T + bias, largest)


def extremes(columns: int) -> tuple[Array, dict[str, Tensor]]:
    """Operands whose products are the largest, of both signs and all in a row.

    Kernels that add pairs of products in 16 bits saturate on these.
    """
    weight = torch.ones(6, columns)
    weight[1] = -1
    weight[1, 0] = 1  # so that the others take the highest code
    weight[2, ::2] = -1
    weight[3, 1::2] = -1
    weight[4, : columns // 2] = -1
    weight[5] = 127 / 128
    weight[5, 0] = -1
    x = np.ones((1, 6, columns), np.float32)
    x[0, 1] = -1
    x[0, 2, ::2] = -1
    x[0, 3, 1::2] = -1
    x[0, 4, : columns // 2] = -1
    x[0, 5, 1:] = 0
    return x, {"weight": weight}


RUN = """
import sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
numpy.save(sys.argv[3], session.run(None, {"x": numpy.load(sys.argv[2])})[0])
print(onnxruntime.__version__)
"""


def oldest(folder: Path, graph: Path, x: Array, env: dict[str, str]) -> Array:
    """What the oldest engine gives."""
    np.save(folder / "in.npy", x)
    files = [str(graph), str(folder / "in.npy"), str(folder / "out.npy")]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *files],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == OnnxCpu.capabilities.engine_min_version
    return np.load(files[2])  # type: ignore[no-any-return]


@pytest.mark.parametrize("columns", [768, 3072, 12288, 4304, 31])
def test_no_sum_saturates(tmp_path: Path, columns: int) -> None:
    x, weights = extremes(columns)
    component = of_width(lambda: nn.Linear(columns, 6, bias=False), columns)
    lowered = lower(tmp_path, component, weights, PLAN)
    made = rtn.quantize(weights["weight"].numpy(), SCHEME)
    assert {0, 255} <= set(made.codes.flatten().tolist())
    wanted = by_integers(x, weights["weight"].numpy())
    assert np.abs(wanted).max() > 0.99 * columns
    assert np.abs(lowered.run(x)[0] - wanted).max() <= 1e-6 * columns


@pytest.mark.parametrize("columns", [3072, 33])
def test_the_oldest_engine_gives_the_same(
    tmp_path: Path, columns: int, ort_floor_env: dict[str, str]
) -> None:
    x, weights = extremes(columns)
    x[0, 5] = draw(columns)
    component = of_width(lambda: nn.Linear(columns, 6, bias=False), columns)
    lowered = lower(tmp_path, component, weights, PLAN)
    graph = lowered.folder / lowered.report.graph
    got = oldest(tmp_path, graph, x, ort_floor_env)
    assert np.array_equal(got, lowered.run(x)[0])
    exact = twin(lowered).run(x)[0]
    old = oldest(tmp_path, graph.with_name("exact.onnx"), x, ort_floor_env)
    assert np.abs(old - exact).max() <= 1e-6 * columns
    assert np.abs(exact - got).max() > 1e-5 * columns  # so that the twin rounds nothing indeed


class Three(nn.Module):
    """Three matrices that read one value, as queries, keys and values do."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, width) for width in (64, 32, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.relu(x)
        return self.q(x), self.k(x), self.v(torch.relu(self.v.weight.shape[0] * x))


def test_a_value_is_rounded_once_for_all_who_read_it(tmp_path: Path) -> None:
    component = of_width(Three, outputs=3)
    lowered = lower(tmp_path, component, weights_of(component), PLAN)
    assert lowered.report.operators["com.microsoft::MatMulIntegerToFloat"] == 3
    assert lowered.report.operators["ai.onnx::QuantizeLinear"] == 2
    assert [y.shape for y in lowered.run(draw(1, 5, 64))] == [(1, 5, 64), (1, 5, 32), (1, 5, 16)]
    weight_bytes = 64 * (64 + 32 + 16)
    assert lowered.report.weight_bytes["int8c"] == weight_bytes + 4 * (64 + 32 + 16)
    for one, other in zip(
        twin(lowered).run(draw(1, 5, 64)), lowered.run(draw(1, 5, 64)), strict=True
    ):
        assert one.shape == other.shape
        assert 1e-4 < np.abs(one - other).max() < 0.3


def test_tiles_are_rounded_position_by_position(tmp_path: Path) -> None:
    """One position of large numbers takes no precision from the others, in its tile or another."""
    component = single(
        lambda: nn.Linear(48, 8),
        (TensorSpec("x", torch.float32, ("G", 9, 48)),),
        (TensorSpec("y", torch.float32, ("G", 9, 8)),),
        axes={"G": (1, 8)},
    )
    lowered = lower(tmp_path, component, weights_of(component), PLAN)
    x = draw(3, 9, 48)
    before = lowered.run(x)[0]
    x[1, 4] *= 1e4
    after = lowered.run(x)[0]
    changed = (before != after).any(-1)
    assert changed[1, 4]
    assert changed.sum() == 1
    for tile in range(3):
        assert np.array_equal(lowered.run(x[tile : tile + 1])[0][0], after[tile])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 70), st.sampled_from([0, 1, 16, 32]), st.floats(1e-6, 1e6))
def test_the_reference_rounds_as_the_oracle_does(columns: int, group: int, size: float) -> None:
    x = torch.from_numpy(draw(2, 3, columns)) * size
    x[1, 1] = 0
    width = group or columns
    (got,) = _rounding(width)(nn.Identity(), (x,))
    assert got.shape == x.shape
    assert (got[1, 1] == 0).all()
    assert (got - rounded(x, width)).abs().max() <= x.abs().max() / 120
    assert ((got - x).abs() <= x.abs().amax(-1, keepdim=True) / 253).all()
    for row in got.reshape(-1, columns):
        assert len(row[:width].unique()) <= 255


REFUSED = {
    "int3c": QuantScheme(bits=3, activations="int8_token"),
    "int4g32": QuantScheme(bits=4, group_size=32, activations="int8_token"),
    "int4cb15": QuantScheme(bits=4, activations="int8_token", scale_bits=8),
    "int8ch": QuantScheme(bits=8, activations="int8_static", scale_bits=16),
    "int4g32h": QuantScheme(bits=4, group_size=32, activations="int8_static", scale_bits=16),
    "int8g32b1": QuantScheme(bits=8, group_size=32, activations="int8_token", scale_bits=8),
    "palette4": QuantScheme(bits=4, palette=True, activations="int8_token"),
    "int8g32": QuantScheme(bits=8, group_size=32, activations="int8_token"),
    "int8cz": QuantScheme(bits=8, symmetric=False, activations="int8_token"),
}


def test_the_target_tells_beforehand_what_it_carries() -> None:
    carries = OnnxCpu.capabilities.carries
    assert carries(SCHEME, gathered=False)
    assert not any(carries(scheme, gathered=False) for scheme in REFUSED.values())
    assert not carries(SCHEME, gathered=True)  # tables are gathered in groups


@pytest.mark.parametrize("form", REFUSED)
def test_schemes_that_integer_kernels_cannot_carry_are_told(tmp_path: Path, form: str) -> None:
    component = of_width(lambda: nn.Linear(64, 8))
    plan = QuantPlan("one", "one scheme for all", (Rule("*", REFUSED[form]),))
    with pytest.raises(ConfigError, match="integer kernels cannot carry") as caught:
        lower(tmp_path, component, weights_of(component), plan)
    assert form in str(caught.value)


def test_two_dynamic_sizes_are_told(tmp_path: Path) -> None:
    component = single(
        lambda: nn.Linear(64, 8),
        (TensorSpec("x", torch.float32, ("A", "B", 64)),),
        (TensorSpec("y", torch.float32, ("A", "B", 8)),),
        axes={"A": (1, 8), "B": (1, 8)},
    )
    with pytest.raises(ConfigError, match="two dynamic sizes"):
        lower(tmp_path, component, weights_of(component), PLAN)


def test_codes_lie_as_the_kernel_reads_them(tmp_path: Path) -> None:
    component = of_width(lambda: nn.Linear(64, 8, bias=False))
    weights = weights_of(component)
    lowered = lower(tmp_path, component, weights, PLAN)
    model = onnx.load(lowered.folder / lowered.report.graph)
    (node,) = (n for n in model.graph.node if n.op_type == "MatMulIntegerToFloat")
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    made = rtn.quantize(weights["weight"].numpy(), SCHEME)
    assert np.array_equal(stored[node.input[1]], made.codes.T)
    assert np.array_equal(stored[node.input[3]], made.scales[:, 0])
    assert [int(stored[node.input[i]]) for i in (4, 5)] == [128, 128]
