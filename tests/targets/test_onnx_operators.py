"""Operators one by one in onnxruntime against torch, and what cannot be lowered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lorgnette.errors import EXIT_WRONG_INPUT, ConfigError
from lorgnette.export.component import TensorSpec
from lorgnette.quantize.methods import rtn
from lorgnette.quantize.plan import PLANS
from lorgnette.targets.onnx import fuse
from tests.small import (
    WIDTH,
    Call,
    Function,
    check,
    draw,
    lower,
    of_width,
    plan_of,
    single,
    weights_of,
)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("columns", "rows", "group"),
    [
        (64, 7, 32),
        (72, 33, 32),
        (588, 5, 32),
        (4304, 3, 32),
        (6912, 3, 32),
        (10368, 3, 32),
        (20, 1, 32),
        (33, 8, 32),
        (200, 8, 128),
        (48, 9, 16),
    ],
)
def test_grouped_matmul(tmp_path: Path, columns: int, rows: int, group: int, bits: int) -> None:
    component = of_width(lambda: nn.Linear(columns, rows), columns)
    weights = weights_of(component)
    plan = plan_of(bits, group)
    lowered = lower(tmp_path, component, weights, plan)
    assert lowered.report.operators == {"ai.onnx::Add": 1, "com.microsoft::MatMulNBits": 1}
    made = rtn.quantize(weights["weight"].numpy(), plan.scheme_for("decoder", "weight"))
    matrix = made.dequantize().astype(np.float64)
    for length in (1, 2, 17):
        x = draw(1, length, columns)
        wanted = x.astype(np.float64) @ matrix.T + weights["bias"].double().numpy()
        assert np.abs(lowered.run(x)[0] - wanted).max() <= 1e-5


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 72])
def test_grouped_matmul_with_rounded_activations(tmp_path: Path, columns: int, bits: int) -> None:
    component = of_width(lambda: nn.Linear(columns, 16, bias=False), columns)
    weights = weights_of(component)
    plan = plan_of(bits, activations="int8_group")
    lowered = lower(tmp_path, component, weights, plan)
    made = rtn.quantize(weights["weight"].numpy(), plan.scheme_for("decoder", "weight"))
    matrix = np.abs(made.dequantize()).astype(np.float64)
    for length in (1, 5):
        x = draw(1, length, columns)
        wanted = x.astype(np.float64) @ made.dequantize().T.astype(np.float64)
        # Every activation may be off by half of 1/127 of the largest.
        bound = np.abs(x).max() / 254 * matrix.sum(axis=1)
        error = np.abs(lowered.run(x)[0] - wanted)
        assert (error <= 1.01 * bound).all()
        assert error.max() > 1e-4


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("columns", "group"), [(32, 32), (96, 32), (256, 128)])
def test_gathered_rows_are_exact(tmp_path: Path, columns: int, group: int, bits: int) -> None:
    component = single(
        lambda: nn.Embedding(300, columns),
        (TensorSpec("ids", torch.int64, (1, "T")),),
        (TensorSpec("y", torch.float32, (1, "T", columns)),),
        name="token_embedding",
        axes={"T": (1, 64)},
    )
    weights = weights_of(component)
    weights["weight"][5] = 0
    plan = plan_of(bits, group)
    lowered = lower(tmp_path, component, weights, plan)
    made = rtn.quantize(weights["weight"].numpy(), plan.scheme_for("token_embedding", "weight"))
    ids = np.array([[0, 5, 299, 17, 17, 128, 1]])
    assert np.array_equal(lowered.run(ids)[0][0], made.dequantize()[ids[0]])
    assert np.array_equal(lowered.run(ids[:, :1])[0][0], made.dequantize()[:1])


@pytest.mark.parametrize("bias", [True, False])
def test_float_matmul(tmp_path: Path, bias: bool) -> None:
    component = of_width(lambda: nn.Linear(WIDTH, 24, bias=bias))
    lowered = check(tmp_path, component, draw(1, 3, WIDTH))
    assert lowered.report.operators["com.microsoft::FusedMatMul"] == 1


FUNCTIONS: dict[str, Function] = {
    "gelu tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu exact": functional.gelu,
    "silu": functional.silu,
    "add": lambda x: x + x,
    "add number": lambda x: x + 3,
    "sub": lambda x: x - 0.25,
    "mul": lambda x: x * x,
    "mul number": lambda x: x * -1.5,
    "div": lambda x: x / 3.0,
    "reshape dynamic": lambda x: x.reshape(1, x.shape[1] * 4, WIDTH // 4),
    "reshape split": lambda x: x.reshape(1, x.shape[1], 4, WIDTH // 4),
    "permute": lambda x: x.permute(2, 0, 1),
    "last": lambda x: x[:, -1],
    "first": lambda x: x[:, 0],
    "slice": lambda x: x[:, :, 3:20],
    "slice from end": lambda x: x[:, :, -7:-2],
    "slice to end": lambda x: x[:, :, 60:],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(tmp_path: Path, name: str) -> None:
    component = of_width(lambda: Call(FUNCTIONS[name]))
    lowered = check(tmp_path, component, 3 * draw(1, 5, WIDTH))
    for length in (1, 64):
        x = draw(1, length, WIDTH)
        wanted = FUNCTIONS[name](torch.from_numpy(x)).numpy()
        assert np.abs(lowered.run(x)[0] - wanted).max() <= 2e-6


@pytest.mark.parametrize("eps", [1e-5, 1e-6, 0.5])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_norms(tmp_path: Path, kind: type[nn.LayerNorm | nn.RMSNorm], eps: float) -> None:
    component = of_width(lambda: kind(WIDTH, eps=eps))
    small = np.float32(1e-3) * draw(1, 4, WIDTH)  # so that the epsilon counts
    check(tmp_path, component, small)


def test_pixels_are_cast_from_bytes(tmp_path: Path) -> None:
    component = single(
        lambda: Call(lambda x: x.to(torch.float32) / 255.0),
        (TensorSpec("x", torch.uint8, ("G", 3, 4)),),
        (TensorSpec("y", torch.float32, ("G", 3, 4)),),
        axes={"G": (1, 8)},
    )
    check(tmp_path, component, np.arange(24, dtype=np.uint8).reshape(2, 3, 4) * 10)


class Residual(nn.Module):
    """Two blocks with residuals: `a = x + f(x)`, `b = a + g(norm(a))`, `norm(b)`."""

    def __init__(self, norm: type[nn.LayerNorm | nn.RMSNorm]) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)
        self.g = nn.Linear(WIDTH, WIDTH)
        self.norm1 = norm(WIDTH, eps=1e-3)
        self.norm2 = norm(WIDTH, eps=1e-3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = x + self.f(x)
        b = a + self.g(self.norm1(a))
        return self.norm2(b), b


class OneSumTwoNorms(nn.Module):
    """A sum that two norms read, and that is an output too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(WIDTH, eps=1e-3)
        self.norm2 = nn.RMSNorm(WIDTH, eps=1e-3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = x + functional.silu(x)
        return self.norm1(total), total, self.norm2(total)


class PlusWeight(nn.Module):
    """A learned position before the norm: a weight of another shape than the activations."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.empty(1, WIDTH))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.position)  # type: ignore[no-any-return]


class PlusBroadcast(nn.Module):
    """A computed operand that is repeated along an axis."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + x[:, 0])  # type: ignore[no-any-return]


FUSIONS: dict[str, tuple[Callable[[], nn.Module], int, dict[str, int]]] = {
    "layer norm stays": (
        lambda: Residual(nn.LayerNorm),
        2,
        {"com.microsoft::SkipLayerNormalization": 0, "ai.onnx::LayerNormalization": 2},
    ),
    "rms norm": (
        lambda: Residual(nn.RMSNorm),
        2,
        {
            "com.microsoft::SkipSimplifiedLayerNormalization": 2,
            "ai.onnx::SimplifiedLayerNormalization": 0,
        },
    ),
    "one sum, two norms": (
        OneSumTwoNorms,
        3,
        {
            "com.microsoft::SkipSimplifiedLayerNormalization": 1,
            "ai.onnx::SimplifiedLayerNormalization": 1,
            "ai.onnx::Add": 0,
        },
    ),
    "weight": (
        PlusWeight,
        1,
        {
            "com.microsoft::SkipSimplifiedLayerNormalization": 0,
            "ai.onnx::SimplifiedLayerNormalization": 1,
        },
    ),
    "broadcast": (
        PlusBroadcast,
        1,
        {
            "com.microsoft::SkipSimplifiedLayerNormalization": 0,
            "ai.onnx::SimplifiedLayerNormalization": 1,
        },
    ),
}


@pytest.mark.parametrize("name", FUSIONS)
def test_fused_norms_give_the_same_numbers(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, outputs, operators = FUSIONS[name]
    component = of_width(build, outputs=outputs)
    x = draw(1, 5, WIDTH)
    fused = check(tmp_path / "fused", component, x)
    for operator, count in operators.items():
        assert fused.report.operators.get(operator, 0) == count, operator
    monkeypatch.setattr(fuse, "fuse_skip_norms", lambda model: 0)
    plain = check(tmp_path / "plain", component, x)
    assert not any("Skip" in operator for operator in plain.report.operators)
    assert [i.name for i in fused.session.get_outputs()] == [f"y{i}" for i in range(outputs)]
    for one, other in zip(fused.run(x), plain.run(x), strict=True):
        assert np.abs(one - other).max() <= 2e-6


REFUSED: dict[str, tuple[Function, str]] = {
    "operator": (torch.sin, "'aten.sin.default' has no translation"),
    "slice with a step": (lambda x: x[:, :, ::2], "slice is not constant"),
    "add with a factor": (lambda x: torch.add(x, x, alpha=2), "extra arguments"),
    "number known at run time": (lambda x: x * x.shape[1], "no graph value"),
    "matmul of activations": (lambda x: functional.linear(x, x[0]), "not a weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_lowered_is_told(tmp_path: Path, name: str) -> None:
    function, told = REFUSED[name]
    component = of_width(lambda: Call(function))
    with pytest.raises(ConfigError, match=told) as caught:
        lower(tmp_path, component, {"unused": torch.ones(1)}, PLANS["fp32"])
    assert caught.value.exit_code == EXIT_WRONG_INPUT


def test_missing_operator_is_told_with_its_component(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorgnette.targets.onnx import operators

    without = {k: v for k, v in operators.TRANSLATIONS.items() if k != "aten.silu.default"}
    monkeypatch.setattr(operators, "TRANSLATIONS", without)
    component = of_width(lambda: Call(functional.silu))
    with pytest.raises(ConfigError) as caught:
        lower(tmp_path, component, {"unused": torch.ones(1)}, PLANS["fp32"])
    for part in ("'aten.silu.default'", "decoder", "target onnx", "operators.py"):
        assert part in str(caught.value)


def test_reshape_with_two_dynamic_sizes_is_told(tmp_path: Path) -> None:
    component = single(
        lambda: Call(lambda x: x.reshape(x.shape[0], x.shape[1], 2, 2)),
        (TensorSpec("x", torch.float32, ("A", "B", 4)),),
        (TensorSpec("y", torch.float32, ("A", "B", 2, 2)),),
        axes={"A": (1, 8), "B": (1, 8)},
    )
    with pytest.raises(ConfigError, match="two dynamic sizes"):
        lower(tmp_path, component, {"unused": torch.ones(1)}, PLANS["fp32"])
