"""The decoder's graph for many positions: other codes of the same weights, on integer kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from lorgnette.export.component import Component, TensorSpec
from lorgnette.export.trace import build_module, trace
from lorgnette.export.weights import WeightSource, module_shapes
from lorgnette.quantize.plan import QuantPlan, Rule
from lorgnette.quantize.scheme import NARROW, QuantScheme
from lorgnette.targets.onnx import many_positions
from lorgnette.targets.onnx.lowering import OnnxLowering
from lorgnette.targets.onnx.weight_file import WeightFile
from tests.quantized import quantized_source
from tests.small import Array, draw, session, single, tensor_folder, weights_of

SCHEME = QuantScheme(bits=4, group_size=32, activations="int8_group", scale_bits=16)
PLAN = QuantPlan("p", "", (Rule("*", SCHEME),))
ROWS = 48


class Linear(nn.Module):
    """A multiplication whose output also has its last position multiplied once more."""

    def __init__(self, columns: int, *, bias: bool) -> None:
        super().__init__()
        self.body = nn.Linear(columns, ROWS, bias=bias)
        self.head = nn.Linear(ROWS, 40, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.body(x)
        return y, self.head(y[:, -1])


def component(columns: int, *, bias: bool) -> Component:
    return single(
        lambda: Linear(columns, bias=bias),
        (TensorSpec("x", torch.float32, (1, "T", columns)),),
        (
            TensorSpec("y", torch.float32, (1, "T", ROWS)),
            TensorSpec("z", torch.float32, (1, 40)),
        ),
        axes={"T": (1, 64)},
    )


def recoded(codes: NDArray[np.uint8], scales: NDArray[np.float32]) -> tuple[Array, Array]:
    """What the graph makes of codes and scales, number by number."""
    new = np.zeros(codes.shape, np.int64)
    steps = np.zeros(len(codes), np.float32)
    for row, (of_row, its_scales) in enumerate(zip(codes, scales, strict=True)):
        steps[row] = max(np.float32(abs(its_scales).max() * np.float32(8 / 64)), np.float32(1e-30))
        for column, code in enumerate(of_row):
            ratio = np.float32(its_scales[column // 32] / steps[row])
            new[row, column] = np.rint(np.float32(int(code) - 8) * ratio)
    return new, steps


def multiplied(x: Array, new: Array, steps: Array) -> Array:
    """Inputs rounded by position to 127 steps either way, times codes, in whole numbers."""
    size = (np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)).astype(np.float32)
    codes = np.clip(np.rint(x / size), -128, 127).astype(np.int64)
    return (codes @ new.T).astype(np.float64) * steps * size


@pytest.mark.parametrize("columns", [64, 80])
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_recoded_weights(tmp_path: Path, columns: int, bias: bool) -> None:
    of = component(columns, bias=bias)
    weights = weights_of(of)
    # Rows of one sign, groups of very different size, and a row of zeros.
    weights["body.weight"][3] = weights["body.weight"][3].abs()
    weights["body.weight"][4, :32] *= 50
    weights["body.weight"][5] = 0
    checkpoint = tensor_folder(tmp_path / "checkpoint", weights)
    source = WeightSource(checkpoint, module_shapes(build_module(of)), of.rules)
    rounded = quantized_source(tmp_path, of, source, PLAN)
    out = tmp_path / "bundle"
    (out / "graphs").mkdir(parents=True)
    with WeightFile(out / "graphs" / "weights.bin") as file:
        graph, of_weights = OnnxLowering(out, file).add_many(of, trace(of), rounded)
    # The head, which has one position, stays as it was.
    operators = [node.op_type for node in onnx.load(out / graph).graph.node]
    assert operators.count("MatMulIntegerToFloat") == 1
    assert operators.count("MatMulNBits") == 1
    run, make = session(out / graph), session(out / of_weights)
    names = [output.name for output in make.get_outputs()]
    given = dict(zip(names, make.run(None, {"first_row": np.array(0, np.int64)}), strict=True))
    made = rounded.codes("body.weight")
    new, steps = recoded(made.codes[:, :columns], made.scales)
    assert np.abs(new).max() == NARROW
    np.testing.assert_array_equal(given["body.weight.codes"].T, new)
    np.testing.assert_array_equal(given["body.weight.steps"], steps)
    # No weight moves by more than half a step of its row.
    moved = np.abs(new * steps[:, None] - made.dequantize())
    assert (moved <= steps[:, None] * 0.5001).all()
    for count in (1, 7, 40):
        x = draw(1, count, columns)
        (y, _) = run.run(None, {"x": x, **given})
        wanted = multiplied(x[0], new, steps)
        if bias:
            wanted = wanted + weights["body.bias"].numpy()
        assert np.abs(y[0] - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_no_matrix_is_made_while_the_graph_loads(tmp_path: Path) -> None:
    """All of them in float32 would take eight times the memory of the codes."""
    import onnxruntime

    of = component(64, bias=False)
    checkpoint = tensor_folder(tmp_path / "checkpoint", weights_of(of))
    source = WeightSource(checkpoint, module_shapes(build_module(of)), of.rules)
    rounded = quantized_source(tmp_path, of, source, PLAN)
    (tmp_path / "graphs").mkdir()
    with WeightFile(tmp_path / "graphs" / "weights.bin") as file:
        _, graph = OnnxLowering(tmp_path, file).add_many(of, trace(of), rounded)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnxruntime.InferenceSession(tmp_path / graph, options, providers=["CPUExecutionProvider"])
    loaded = onnx.load(tmp_path / "loaded.onnx", load_external_data=False)
    operators = [node.op_type for node in loaded.graph.node]
    assert operators.count("GatherBlockQuantized") == 1
    whole = 64 * ROWS
    for initializer in loaded.graph.initializer:
        if initializer.data_type == onnx.TensorProto.FLOAT:
            assert np.prod(initializer.dims) < whole


@pytest.mark.parametrize(
    ("scheme", "is_recoded"),
    [
        (SCHEME, True),
        (QuantScheme(bits=4, group_size=16, activations="int8_group"), True),
        (QuantScheme(bits=8, group_size=32, activations="int8_group"), False),
        (QuantScheme(bits=4, group_size=32), False),
        (QuantScheme(bits=4, group_size=32, symmetric=False, activations="int8_group"), False),
        (QuantScheme(bits=32), False),
    ],
)
def test_only_codes_that_a_row_resolves_are_recoded(scheme: QuantScheme, is_recoded: bool) -> None:
    assert many_positions.is_recoded(scheme) == is_recoded
