"""One linear layer at a time: scales of every sign and size, and torchao's own layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

pytest.importorskip("executorch", reason="executorch is not installed")

from lorgnette.quantize.scheme import QuantScheme, QuantTensor
from lorgnette.runtime.engines.executorch import quiet
from lorgnette.targets.executorch.program import (
    lower_method,
    register_operators,
    write_program,
    xnnpack_partitioner,
)
from lorgnette.targets.executorch.quantized import TokenLinear, TokenLinears
from tests.executorch_case import by_position, off

Array = NDArray[np.float32]
ROWS, COLUMNS = 24, 96
GROUPED = QuantScheme(bits=4, group_size=32, activations="int8_token", scale_bits=16)
BY_CHANNEL = QuantScheme(bits=8, activations="int8_token")


def traced(module: nn.Module) -> ExportedProgram:
    length = Dim("T", min=1, max=64)
    with torch.no_grad():
        return torch.export.export(
            module.eval(), (torch.zeros(1, 5, COLUMNS),), dynamic_shapes=({1: length},)
        )


def run(path: Path, x: Tensor) -> Array:
    with quiet():
        from executorch.extension.pybindings import portable_lib

        found: Array = portable_lib._load_for_executorch(str(path)).forward([x])[0].numpy()
    return found


def lowered(folder: Path, module: nn.Module, x: Tensor) -> tuple[Array, int]:
    """What XNNPACK gives for a module, and how many operators stayed outside it."""
    register_operators()
    method = lower_method(traced(module), xnnpack_partitioner(lean=True))
    write_program(folder / "one.pte", {"forward": method.program}, {})
    targets = [str(n.target) for n in method.program.graph.nodes if n.op == "call_function"]
    outside = [t for t in targets if "EdgeOpOverload" in t]
    return run(folder / "one.pte", x), len(outside)


def scales_of(kind: str, scheme: QuantScheme) -> Array:
    draw = np.random.default_rng(1)
    scales = np.exp2(draw.integers(-9, -5, (ROWS, scheme.groups(COLUMNS)))).astype(np.float32)
    if kind in ("negative", "mixed"):
        scales *= -1 if kind == "negative" else draw.choice([-1, 1], scales.shape)
    if kind == "tiny":
        scales[3:6] = np.float32(2.0**-24)
    return scales.astype(np.float32)


@pytest.mark.parametrize("scheme", [GROUPED, BY_CHANNEL], ids=["int4", "int8"])
@pytest.mark.parametrize("kind", ["positive", "negative", "mixed", "tiny", "zero"])
def test_codes_of_any_scale_multiply_rounded_inputs(
    tmp_path: Path, scheme: QuantScheme, kind: str
) -> None:
    draw = np.random.default_rng(0)
    codes = draw.integers(0, 1 << scheme.bits, (ROWS, COLUMNS)).astype(np.uint8)
    scales, middle = scales_of(kind, scheme), 1 << (scheme.bits - 1)
    if kind == "zero":  # as methods make groups of zeros
        scales[5], codes[5] = 0, middle
    zeros = np.full(scales.shape, middle, np.uint8)
    made = QuantTensor(codes, scales, zeros, COLUMNS, scheme)
    bias = torch.from_numpy(draw.standard_normal(ROWS, dtype=np.float32))
    module = TokenLinears([TokenLinear(made, bias)], single=True)
    x = torch.from_numpy(draw.standard_normal((1, 7, COLUMNS), dtype=np.float32))
    got, outside = lowered(tmp_path, module, x)
    weight = torch.from_numpy(made.dequantize())
    wanted = functional.linear(by_position(x), weight, bias).numpy()
    assert off(got, wanted) < 1e-6
    assert off(got, functional.linear(x, weight, bias).numpy()) > 1e-4
    assert outside == 0


def test_torchao_makes_the_same_of_its_own_codes(tmp_path: Path) -> None:
    """The library's layer, lowered as the library does it, on codes that are then handed to us."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    torch.manual_seed(0)
    layer = nn.Linear(COLUMNS, ROWS)
    theirs, bias = nn.Sequential(layer), layer.bias.detach().clone()
    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=vars(torch)["int4"],
        weight_granularity=PerGroup(32),
        weight_scale_dtype=torch.bfloat16,
    )
    quantize_(theirs, config)
    weight: Any = layer.weight
    x = torch.randn(1, 7, COLUMNS)
    edge = to_edge_transform_and_lower(traced(theirs), partitioner=[XnnpackPartitioner()])
    path = tmp_path / "theirs.pte"
    path.write_bytes(edge.to_executorch().buffer)
    wanted = run(path, x)
    codes = (weight.qdata.to(torch.int16) + 8).to(torch.uint8).numpy()
    scales = weight.scale.float().numpy()
    zeros = np.full(scales.shape, 8, np.uint8)
    made = QuantTensor(codes, scales, zeros, COLUMNS, GROUPED)
    ours = TokenLinears([TokenLinear(made, bias)], single=True)
    got, _ = lowered(tmp_path, ours, x)
    assert np.array_equal(got, wanted)
