"""Every scheme of integer kernels, static activations among them: against integer arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lorgnette.errors import ConfigError
from lorgnette.export.reference import Reference, _static_rounding
from lorgnette.export.trace import build_module
from lorgnette.export.weights import WeightSource, module_shapes
from lorgnette.quantize.methods import rtn
from lorgnette.quantize.plan import QuantPlan, Rule
from lorgnette.quantize.scheme import InputRange, QuantScheme, QuantTensor
from lorgnette.quantize.store import QuantizedSource
from lorgnette.targets.onnx.lowering import MATRICES, OnnxCpu
from tests.quantized import quantized_source
from tests.small import Array, Lowered, draw, lower, of_width, session, tensor_folder, weights_of

RANGE = InputRange(scale=0.03, zero_point=100)
SCHEMES = {
    scheme.full_name: scheme
    for each in MATRICES
    for scheme in each.schemes()
    if scheme.activations in ("int8_token", "int8_static")
}
STATIC = QuantScheme(bits=8, activations="int8_static")


def plan_for(scheme: QuantScheme) -> QuantPlan:
    return QuantPlan("one", "one scheme for all", (Rule("*", scheme),))


def quantized(weight: Array, scheme: QuantScheme, how: InputRange = RANGE) -> QuantTensor:
    """A matrix by rounding to nearest; one for all rows where the scheme says so."""
    if scheme.per_tensor:
        flat = rtn.quantize(weight.reshape(1, -1), replace_scheme(scheme, per_tensor=False))
        rows = len(weight)
        made = QuantTensor(
            codes=flat.codes.reshape(weight.shape),
            scales=np.repeat(flat.scales, rows, 0),
            zero_points=np.repeat(flat.zero_points, rows, 0),
            columns=weight.shape[1],
            scheme=scheme,
        )
    else:
        made = rtn.quantize(weight, scheme)
    return replace(made, input_range=how if scheme.activations == "int8_static" else None)


def replace_scheme(scheme: QuantScheme, *, per_tensor: bool) -> QuantScheme:
    return QuantScheme(bits=scheme.bits, activations=scheme.activations, per_tensor=per_tensor)


@contextmanager
def calibrated(ranges: dict[str, InputRange] | None = None) -> Iterator[None]:
    """Matrices come with the range of their inputs, as calibration would give them."""

    def made(source: QuantizedSource, parameter: str) -> QuantTensor:
        how = (ranges or {}).get(parameter, RANGE)
        return quantized(source.unrounded(parameter), source.rule(parameter).scheme, how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuantizedSource, "codes", made)
        yield


def by_integers(x: Array, made: QuantTensor) -> Array:
    """The product of rounded inputs and rounded weights: codes in int64, scales in float64."""
    if made.input_range is None:
        largest = np.abs(x).max(-1, keepdims=True)
        scale = np.maximum(largest / np.float32(127), np.float32(1e-30)).astype(np.float64)
        codes = np.rint(x / scale.astype(np.float32)).astype(np.int64)
    else:
        how = made.input_range
        scale = np.float64(np.float32(how.scale))
        shifted = np.rint(x / np.float32(how.scale)) + how.zero_point
        codes = np.clip(shifted, 0, 255).astype(np.int64) - how.zero_point
    return np.asarray(codes * scale @ exact(made).T)


def exact(made: QuantTensor) -> Array:
    """The weights in float64."""
    rows, groups = made.scales.shape
    codes = made.codes.reshape(rows, groups, -1).astype(np.int64) - made.zero_points[:, :, None]
    matrix = codes * made.scales[:, :, None].astype(np.float64)
    return np.asarray(matrix.reshape(rows, -1)[:, : made.columns])


def twin(lowered: Lowered) -> Lowered:
    """The same graph without rounding."""
    graph = lowered.folder / lowered.report.graph
    OnnxCpu().write_exact(graph, graph.with_name("exact.onnx"))
    return Lowered(lowered.folder, lowered.report, session(graph.with_name("exact.onnx")))


@settings(max_examples=24, deadline=None)
@given(
    st.integers(1, 150),
    st.integers(1, 20),
    st.sampled_from(sorted(SCHEMES)),
    st.booleans(),
)
@example(33, 5, "int4c/int8_token", True)
@example(31, 5, "int4c/int8_static", True)
@example(65, 5, "int4g32b15/int8_static", False)
@example(128, 5, "int4g128b15/int8_token", True)
def test_any_shape_is_what_integers_give(columns: int, rows: int, name: str, bias: bool) -> None:
    """Columns that fill neither groups nor bytes, rows of zeros and outlier channels among them."""
    scheme = SCHEMES[name]
    component = of_width(lambda: nn.Linear(columns, rows, bias=bias), columns)
    weights = weights_of(component, seed=columns)
    weights["weight"][rows // 2] = 0
    x = np.random.default_rng(rows).standard_normal((1, 4, columns), dtype=np.float32)
    x[..., columns // 3] *= 9  # past the range of static activations
    x[:, 2] = 0
    with TemporaryDirectory() as folder:
        with calibrated():
            lowered = lower(Path(folder), component, weights, plan_for(scheme))
        made = quantized(weights["weight"].numpy(), scheme)
        added = weights["bias"].numpy() if bias else np.zeros(rows, np.float32)
        size = float(np.abs(exact(made)).sum(1).max() * np.abs(x).max() + np.abs(added).max())
        assert np.abs(lowered.run(x)[0] - by_integers(x, made) - added).max() <= 1e-6 * size
        float_product = x.astype(np.float64) @ exact(made).T + added
        assert np.abs(twin(lowered).run(x)[0] - float_product).max() <= 1e-6 * size
        parts = sum(lowered.report.weight_bytes.values()) - 4 * rows * bias
        assert 0 <= scheme.stored_bytes(rows, columns) - parts <= rows  # codes that share a byte


RUN = """
import sys
import numpy, onnxruntime
for folder in sys.argv[1:]:
    for name in ("graph", "exact"):
        session = onnxruntime.InferenceSession(
            folder + f"/{name}.onnx", providers=["CPUExecutionProvider"]
        )
        x = numpy.load(folder + "/in.npy")
        numpy.save(folder + f"/{name}.npy", session.run(None, {"x": x})[0])
print(onnxruntime.__version__)
"""


def test_the_oldest_engine_gives_the_same(tmp_path: Path, ort_floor_env: dict[str, str]) -> None:
    """And its twin, which rounds nothing: for every scheme, on products that would saturate."""
    wanted: dict[Path, tuple[Array, Array]] = {}
    x = draw(1, 3, 328)
    for number, scheme in enumerate(SCHEMES.values()):
        component = of_width(lambda: nn.Linear(328, 6), 328)
        with calibrated({"weight": InputRange(scale=0.05, zero_point=7)}):
            lowered = lower(
                tmp_path / f"{number}", component, weights_of(component), plan_for(scheme)
            )
        folder = lowered.folder / "graphs"
        rounding_none = twin(lowered)
        (lowered.folder / lowered.report.graph).rename(folder / "graph.onnx")
        np.save(folder / "in.npy", x)
        wanted[folder] = (lowered.run(x)[0], rounding_none.run(x)[0])
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, wanted)],
        env=ort_floor_env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == OnnxCpu.capabilities.engine_min_version
    for folder, (rounding, none) in wanted.items():
        assert np.abs(np.load(folder / "graph.npy") - rounding).max() <= 1e-5
        assert np.abs(np.load(folder / "exact.npy") - none).max() <= 1e-5
        assert np.abs(rounding - none).max() > 1e-3


class Three(nn.Module):
    """Three matrices that read one value."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, width) for width in (64, 32, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.relu(x)
        return self.q(x), self.k(x), self.v(x)


@pytest.mark.parametrize(("other", "roundings"), [(RANGE, 1), (InputRange(0.03, 101), 2)])
def test_one_value_is_rounded_once_for_each_range(
    tmp_path: Path, other: InputRange, roundings: int
) -> None:
    component = of_width(Three, outputs=3)
    weights = weights_of(component)
    with calibrated({"v.weight": other}):
        lowered = lower(tmp_path, component, weights, plan_for(STATIC))
    operators = lowered.report.operators
    assert operators["com.microsoft::MatMulIntegerToFloat"] == 3
    assert operators["ai.onnx::QuantizeLinear"] == roundings
    # No pass over activations but the rounding: nothing looks for the largest, or adds a bias.
    assert set(operators) == {
        "com.microsoft::MatMulIntegerToFloat",
        "ai.onnx::QuantizeLinear",
        "ai.onnx::Relu",
    }
    x = draw(1, 5, 64)
    for name, how, got, plain in zip(
        "qkv", (RANGE, RANGE, other), lowered.run(x), twin(lowered).run(x), strict=True
    ):
        made = quantized(weights[f"{name}.weight"].numpy(), STATIC, how)
        bias = weights[f"{name}.bias"].numpy()
        assert np.abs(got - by_integers(np.maximum(x, 0), made) - bias).max() <= 1e-5
        assert np.abs(plain - np.maximum(x, 0) @ exact(made).T - bias).max() <= 1e-5


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("int4c/int8_token", {"QuantizeLinear"}),
        ("int4g32b15/int8_token", {"QuantizeLinear", "DequantizeLinear"}),
    ],
)
def test_codes_are_widened_as_the_engine_loads_or_as_it_runs(
    tmp_path: Path, name: str, left: set[str]
) -> None:
    component = of_width(lambda: nn.Linear(64, 9), 64)
    lowered = lower(tmp_path, component, weights_of(component), plan_for(SCHEMES[name]))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    graph = lowered.folder / lowered.report.graph
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "loaded.onnx", load_external_data=False).graph.node
    of_interest = {"Cast", "QuantizeLinear", "DequantizeLinear"}
    assert {node.op_type for node in nodes} & of_interest == left
    assert "ai.onnx::Cast" in lowered.report.operators


def test_weights_are_widened_one_multiplication_after_the_other(tmp_path: Path) -> None:
    """In the order of nodes that makes the engine do so; else all would lie in memory at once."""
    component = of_width(lambda: nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))), 64)
    scheme = SCHEMES["int4g32b15/int8_token"]
    lowered = lower(tmp_path, component, weights_of(component), plan_for(scheme))
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    engine = onnxruntime.InferenceSession(
        lowered.folder / lowered.report.graph, options, providers=["CPUExecutionProvider"]
    )
    engine.run(None, {"x": draw(1, 3, 64)})
    events = json.loads(Path(engine.end_profiling()).read_text())
    ran = [e["args"]["op_name"] for e in events if e["name"].endswith("kernel_time")]
    of_interest = [n for n in ran if n in ("DequantizeLinear", "MatMulIntegerToFloat")]
    assert of_interest == ["DequantizeLinear", "MatMulIntegerToFloat"] * 4


@pytest.mark.parametrize("name", ["int4c/int8_token", "int4g32b15/int8_token"])
def test_codes_are_stored_two_a_byte(tmp_path: Path, name: str) -> None:
    """Column by column, the first in the lower half: against the codes, one by one."""
    scheme, columns, rows = SCHEMES[name], 96, 5
    component = of_width(lambda: nn.Linear(columns, rows, bias=False), columns)
    weights = weights_of(component)
    lowered = lower(tmp_path, component, weights, plan_for(scheme))
    model = onnx.load(lowered.folder / lowered.report.graph, load_external_data=False)
    (tensor,) = (t for t in model.graph.initializer if t.name.endswith(".columns"))
    assert list(tensor.dims) == [columns, rows]
    place = {entry.key: entry.value for entry in tensor.external_data}
    data = (lowered.folder / "graphs" / place["location"]).read_bytes()[int(place["offset"]) :]
    made = quantized(weights["weight"].numpy(), scheme)
    for column in range(columns):
        for row in range(rows):
            byte, high = divmod(column * rows + row, 2)
            nibble = data[byte] >> 4 if high else data[byte] & 15
            signed = nibble - 16 * (nibble > 7) + 8
            assert made.codes[row, column] == (signed if scheme.group_size else nibble)


# What is refused


def test_static_activations_without_a_range_are_told(tmp_path: Path) -> None:
    component = of_width(lambda: nn.Linear(64, 8))
    with pytest.raises(ConfigError, match="no range is known of the inputs of a matrix") as caught:
        lower(tmp_path, component, weights_of(component), plan_for(STATIC))
    assert "decoder/weight" in str(caught.value)


# The reference


@given(st.floats(1e-3, 10), st.integers(0, 255), st.integers(1, 9))
def test_the_reference_rounds_to_the_range(scale: float, zero: int, seed: int) -> None:
    x = 4 * np.random.default_rng(seed).standard_normal((3, 7), dtype=np.float32)
    (got,) = _static_rounding(InputRange(scale, zero))(nn.Identity(), (torch.from_numpy(x),))
    step = np.float32(scale)
    for value, rounded in zip(x.flatten(), got.flatten().numpy(), strict=True):
        code = min(max(round(float(value / step)) + zero, 0), 255)
        assert rounded == np.float32(code - zero) * step


def test_the_reference_wants_a_range_for_each_static_matrix() -> None:
    component = of_width(lambda: nn.Sequential(nn.Linear(64, 8)))
    with TemporaryDirectory() as folder:
        checkpoint = tensor_folder(Path(folder) / "c", weights_of(component))
        shapes = module_shapes(build_module(component))
        published = WeightSource(checkpoint, shapes, component.rules)
        source = quantized_source(Path(folder), component, published, plan_for(STATIC))
        reference = Reference({"decoder": component}, {"decoder": source})
        with pytest.raises(ConfigError, match=r"decoder/0\.weight"):
            reference.round_activations()
        made = replace(source.codes("0.weight"), input_range=RANGE)
        source.place("0.weight", made)
        assert reference.round_activations() == {"decoder"}
        module = reference._module("decoder")
        x = torch.from_numpy(draw(1, 3, 64))
        (rounded,) = _static_rounding(RANGE)(module, (x,))
        wanted = rounded @ torch.from_numpy(made.dequantize()).T + source.tensor("0.bias")
        assert (module(x) - wanted).abs().max() <= 1e-5
