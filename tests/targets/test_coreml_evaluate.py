"""Every operator of the evaluator against numpy, and against what coremltools itself infers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lorgnette.errors import BundleError
from lorgnette.targets.coreml.evaluate import Evaluator, unknown_operators
from lorgnette.targets.coreml.kernels import KERNELS
from lorgnette.targets.coreml.kernels_moves import MOVES
from lorgnette.targets.coreml.mil import IOS18, Builder, Function, Var, types
from lorgnette.targets.coreml.package import read_package
from lorgnette.targets.coreml.save import save_package
from lorgnette.targets.coreml.weights import DTYPES, WeightStore

Array = NDArray[Any]
Make = Callable[..., Any]

MIL_TYPES = {
    np.dtype(np.float32): types.fp32,
    np.dtype(np.float16): types.fp16,
    np.dtype(np.int32): types.int32,
}


def draw(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run(
    folder: Path, make: Make, inputs: Mapping[str, Array], *, exact: bool = False
) -> list[Array]:
    """Saves a function that applies `make` to its inputs, reads it back and runs it."""
    specs = {n: Builder.TensorSpec(a.shape, MIL_TYPES[a.dtype]) for n, a in inputs.items()}
    Builder.name_count.clear()
    with Function(specs, IOS18) as function:
        made = make(**dict(function.inputs))
        outputs = [made] if isinstance(made, Var) else list(made)
        function.set_outputs(outputs)
    path = folder / "one.mlpackage"
    save_package({"main": function}, WeightStore(), path)
    found = Evaluator(read_package(path), exact=exact).run("main", inputs)
    return [found[var.name] for var in outputs]


def inferred(make: Make, inputs: Mapping[str, Array]) -> list[Array]:
    """What coremltools computes of constants."""
    with Function({"unused": Builder.TensorSpec((1,))}, IOS18):
        constants = {name: Builder.const(val=array) for name, array in inputs.items()}
        made = make(**constants)
    outputs = [made] if isinstance(made, Var) else list(made)
    assert all(var.val is not None for var in outputs), "coremltools infers no value"
    return [np.asarray(var.val) for var in outputs]


X = draw(2, 3, 4)
Y = draw(4, seed=1)
ROWS = draw(1, 5, 8)
SQUARE = draw(1, 4, 6, 6)

ELEMENTWISE: dict[str, tuple[Make, Mapping[str, Array], Callable[..., Array]]] = {
    "abs": (lambda x: Builder.abs(x=x), {"x": X}, np.abs),
    "floor": (lambda x: Builder.floor(x=x), {"x": 3 * X}, np.floor),
    "relu": (lambda x: Builder.relu(x=x), {"x": X}, lambda x: np.maximum(x, 0)),
    "sigmoid": (lambda x: Builder.sigmoid(x=x), {"x": X}, lambda x: 1 / (1 + np.exp(-x))),
    "silu": (lambda x: Builder.silu(x=x), {"x": X}, lambda x: x / (1 + np.exp(-x))),
    "gelu": (
        lambda x: Builder.gelu(x=x, mode="EXACT"),
        {"x": X},
        lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2))),
    ),
    "gelu tanh": (
        lambda x: Builder.gelu(x=x, mode="TANH_APPROXIMATION"),
        {"x": X},
        lambda x: x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    ),
    "gelu sigmoid": (
        lambda x: Builder.gelu(x=x, mode="SIGMOID_APPROXIMATION"),
        {"x": X},
        lambda x: x / (1 + np.exp(-1.702 * x)),
    ),
    "sigmoid_hard": (
        lambda x: Builder.sigmoid_hard(x=x, alpha=np.float32(0.3), beta=np.float32(0.4)),
        {"x": 3 * X},
        lambda x: np.clip(0.3 * x + 0.4, 0, 1),
    ),
    "rsqrt": (
        lambda x: Builder.rsqrt(x=x, epsilon=np.float32(0.25)),
        {"x": np.abs(X)},
        lambda x: 1 / np.sqrt(x + 0.25),
    ),
    "add": (lambda x, y: Builder.add(x=x, y=y), {"x": X, "y": Y}, np.add),
    "sub": (lambda x, y: Builder.sub(x=x, y=y), {"x": X, "y": Y}, np.subtract),
    "mul": (lambda x, y: Builder.mul(x=x, y=y), {"x": X, "y": Y}, np.multiply),
    "real_div": (lambda x, y: Builder.real_div(x=x, y=y), {"x": X, "y": Y}, np.divide),
    "maximum": (lambda x, y: Builder.maximum(x=x, y=y), {"x": X, "y": Y}, np.maximum),
    "cast": (
        lambda x: Builder.cast(x=x, dtype="int32"),
        {"x": 5 * X},
        lambda x: np.trunc(x).astype(np.int32),
    ),
    "reduce_max": (
        lambda x: Builder.reduce_max(x=x, axes=[-1], keep_dims=True),
        {"x": X},
        lambda x: x.max(-1, keepdims=True),
    ),
    "reduce_mean": (
        lambda x: Builder.reduce_mean(x=x, axes=[0, 2], keep_dims=False),
        {"x": X},
        lambda x: x.mean((0, 2)),
    ),
    "linear": (
        lambda x: Builder.linear(x=x, weight=draw(3, 8, seed=2), bias=draw(3, seed=3)),
        {"x": ROWS},
        lambda x: x @ draw(3, 8, seed=2).T + draw(3, seed=3),
    ),
    "layer_norm": (
        lambda x: Builder.layer_norm(
            x=x, axes=[-1], gamma=draw(8, seed=4), beta=draw(8, seed=5), epsilon=np.float32(1e-2)
        ),
        {"x": ROWS},
        lambda x: (
            (x - x.mean(-1, keepdims=True))
            / np.sqrt(x.var(-1, keepdims=True) + 1e-2)
            * draw(8, seed=4)
            + draw(8, seed=5)
        ),
    ),
    "avg_pool": (
        lambda x: Builder.avg_pool(x=x, kernel_sizes=[2, 3], strides=[2, 3], pad_type="valid"),
        {"x": SQUARE},
        lambda x: x.reshape(1, 4, 3, 2, 2, 3).mean((3, 5)),
    ),
    "reshape": (
        lambda x: Builder.reshape(x=x, shape=[4, 6]),
        {"x": X},
        lambda x: x.reshape(4, 6),
    ),
    "transpose": (
        lambda x: Builder.transpose(x=x, perm=[2, 0, 1]),
        {"x": X},
        lambda x: x.transpose(2, 0, 1),
    ),
    "expand_dims": (
        lambda x: Builder.expand_dims(x=x, axes=[1, -1]),
        {"x": X},
        lambda x: x[:, None, :, :, None],
    ),
    "squeeze": (lambda x: Builder.squeeze(x=x, axes=[0]), {"x": ROWS}, lambda x: x[0]),
    "concat": (
        lambda x, y: Builder.concat(values=[x, y], axis=1),
        {"x": X, "y": draw(2, 5, 4)},
        lambda x, y: np.concatenate([x, y], 1),
    ),
    "stack": (
        lambda x, y: Builder.stack(values=[x, y], axis=3),
        {"x": X, "y": draw(2, 3, 4, seed=6)},
        lambda x, y: np.stack([x, y], 3),
    ),
    "pad": (
        lambda x: Builder.pad(
            x=x, pad=np.array([1, 0, 2, 3], np.int32), mode="constant", constant_val=np.float32(0.5)
        ),
        {"x": X},
        lambda x: np.pad(x, ((0, 0), (1, 0), (2, 3)), constant_values=0.5),
    ),
    "gather": (
        lambda x, i: Builder.gather(x=x, indices=i, axis=1, validate_indices=False),
        {"x": X, "i": np.array([[2, 0], [1, 1]], np.int32)},
        lambda x, i: np.take(x, i, 1),
    ),
    "slice_by_size": (
        lambda x, b: Builder.slice_by_size(x=x, begin=b, size=np.array([2, 1, 3], np.int32)),
        {"x": X, "b": np.array([0, 2, 1], np.int32)},
        lambda x, b: x[0:2, b[1] : b[1] + 1, b[2] : b[2] + 3],
    ),
    "slice_by_index": (
        lambda x: Builder.slice_by_index(
            x=x, begin=[0, 1, 1], end=[2, 0, 3], squeeze_mask=[False, True, False]
        ),
        {"x": X},
        lambda x: x[:, 1, 1:3],
    ),
    "slice_update": (
        lambda x, u, b: Builder.slice_update(
            x=x, update=u, begin=b, end=np.array([2, 2, 4], np.int32)
        ),
        {"x": X, "u": draw(2, 1, 2, seed=7), "b": np.array([0, 1, 2], np.int32)},
        lambda x, u, b: np.concatenate(
            [x[:, :1], np.concatenate([x[:, 1:2, :2], u], 2), x[:, 2:]], 1
        ),
    ),
}
NOT_INFERRED = {"silu", "avg_pool"}
"""What coremltools computes no value of."""


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_operator_is_what_numpy_computes(tmp_path: Path, name: str) -> None:
    make, inputs, wanted = ELEMENTWISE[name]
    (got,) = run(tmp_path, make, inputs)
    expected = wanted(*inputs.values())
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", [name for name in ELEMENTWISE if name not in NOT_INFERRED])
def test_operator_is_what_coremltools_infers(tmp_path: Path, name: str) -> None:
    make, inputs, _ = ELEMENTWISE[name]
    (got,) = run(tmp_path, make, inputs)
    (expected,) = inferred(make, inputs)
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", sorted(NOT_INFERRED))
def test_what_is_not_compared_with_coremltools_cannot_be(name: str) -> None:
    make, inputs, _ = ELEMENTWISE[name]
    with pytest.raises(AssertionError, match="infers no value"):
        inferred(make, inputs)


def test_every_operator_is_tested() -> None:
    elsewhere = {
        "split",
        "less_equal",
        "conv",
        "scaled_dot_product_attention",
        "constexpr_blockwise_shift_scale",
        "constexpr_lut_to_dense",
        "read_state",
        "write_state",
    }
    assert {*KERNELS, *MOVES} == {name.split()[0] for name in ELEMENTWISE} | elsewhere


def test_split_in_equal_parts_and_in_others(tmp_path: Path) -> None:
    one, two = run(tmp_path, lambda x: Builder.split(x=x, num_splits=2, axis=2), {"x": X})
    assert np.array_equal(one, X[..., :2])
    assert np.array_equal(two, X[..., 2:])
    parts = run(tmp_path / "b", lambda x: Builder.split(x=x, split_sizes=[1, 3], axis=-1), {"x": X})
    assert [part.shape[-1] for part in parts] == [1, 3]


def test_comparison_selects(tmp_path: Path) -> None:
    def make(x: Var, y: Var) -> Var:
        return Builder.cast(x=Builder.less_equal(x=x, y=y), dtype="fp32")

    (got,) = run(tmp_path, make, {"x": X, "y": Y})
    assert np.array_equal(got, (X <= Y).astype(np.float32))


@pytest.mark.parametrize(("strides", "border", "groups"), [(1, 1, 4), (2, 1, 1), (2, 0, 2)])
def test_convolution_is_a_sum_over_windows(
    tmp_path: Path, strides: int, border: int, groups: int
) -> None:
    kernel, bias = draw(8, 4 // groups, 3, 3, seed=8), draw(8, seed=9)

    def make(x: Var) -> Var:
        return Builder.conv(
            x=x,
            weight=kernel,
            bias=bias,
            strides=[strides] * 2,
            pad_type="custom",
            pad=[border] * 4,
            dilations=[1, 1],
            groups=groups,
        )

    (got,) = run(tmp_path, make, {"x": SQUARE})
    padded = np.pad(SQUARE, ((0, 0), (0, 0), (border, border), (border, border)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    windows = windows[:, :, ::strides, ::strides]
    share = 4 // groups
    wanted = np.empty(got.shape, np.float32)
    for channel in range(8):
        first = channel // (8 // groups) * share
        part = windows[0, first : first + share]
        wanted[0, channel] = np.einsum("chwij,cij->hw", part, kernel[channel]) + bias[channel]
    np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_attention_is_softmax_attention(tmp_path: Path, mask: str) -> None:
    query, key, value = draw(1, 2, 3, 8), draw(1, 2, 6, 8, seed=1), draw(1, 2, 6, 8, seed=2)
    visible = np.tri(3, 6, 1) > 0
    added = np.where(visible, draw(3, 6, seed=3), -1e4).astype(np.float32)
    allowed = {"none": None, "bool": visible, "float": added}[mask]

    def make(q: Var, k: Var, v: Var) -> Var:
        return Builder.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=allowed)

    inputs: dict[str, Array] = {"q": query, "k": key, "v": value}
    (got,) = run(tmp_path, make, inputs)
    scores = query @ key.swapaxes(2, 3) / np.sqrt(8)
    if mask != "none":
        scores = np.where(visible, scores, -np.inf) if mask == "bool" else scores + added
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    np.testing.assert_allclose(got, shares @ value, atol=1e-6)
    np.testing.assert_allclose(got, inferred(make, inputs)[0], atol=1e-6)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int8", "uint8"])
@pytest.mark.parametrize("blocks", [(1, 1), (6, 1), (6, 4), (3, 2)])
def test_blocks_of_codes_are_expanded(tmp_path: Path, dtype: str, blocks: tuple[int, int]) -> None:
    bits, signed = int(dtype[-1]), not dtype.startswith("u")
    low, high = (-(1 << (bits - 1)), 1 << (bits - 1)) if signed else (0, 1 << bits)
    source = np.random.default_rng(4)
    data = source.integers(low, high, (6, 16)).astype(DTYPES[dtype])
    offset = source.integers(low, high, blocks).astype(DTYPES[dtype])
    scale = source.uniform(0.01, 0.1, blocks).astype(np.float16)

    def make(x: Var) -> Var:
        weight = Builder.constexpr_blockwise_shift_scale(data=data, scale=scale, offset=offset)
        return Builder.linear(x=x, weight=weight)

    x = np.eye(16, dtype=np.float16)
    (got,) = run(tmp_path, make, {"x": x})
    rows, columns = 6 // blocks[0], 16 // blocks[1]
    wide = [np.repeat(np.repeat(a, rows, 0), columns, 1) for a in (scale, offset)]
    wanted = (data.astype(np.float32) - wide[1]) * wide[0].astype(np.float32)
    assert np.array_equal(got.T, wanted.astype(np.float16).astype(np.float32))
    (exact,) = run(tmp_path / "exact", make, {"x": x}, exact=True)
    np.testing.assert_allclose(exact.T, wanted, rtol=1e-6)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("tables", [1, 3])
def test_palettes_are_looked_up(tmp_path: Path, bits: int, tables: int) -> None:
    source = np.random.default_rng(5)
    indices = source.integers(0, 1 << bits, (6, 10)).astype(
        DTYPES[f"uint{bits}"] if bits < 8 else np.uint8
    )
    lut = source.standard_normal((tables, 1, 1 << bits, 1)).astype(np.float16)

    def make(x: Var) -> Var:
        return Builder.linear(x=x, weight=Builder.constexpr_lut_to_dense(indices=indices, lut=lut))

    (got,) = run(tmp_path, make, {"x": np.eye(10, dtype=np.float16)})
    which = np.arange(6) // (6 // tables)
    assert np.array_equal(got.T, lut[which[:, None], 0, indices.astype(int), 0].astype(np.float32))


def test_float16_results_are_rounded_and_overflow(tmp_path: Path) -> None:
    x = np.array([[1.0, 300.0, 1e-4, 2049.0]], np.float16)
    (got,) = run(tmp_path, lambda x: Builder.mul(x=x, y=x), {"x": x})
    with np.errstate(over="ignore"):
        assert np.array_equal(got, (x * x).astype(np.float32))
    assert np.isinf(got[0, 1])
    (exact,) = run(tmp_path / "exact", lambda x: Builder.mul(x=x, y=x), {"x": x}, exact=True)
    assert exact[0, 1] == 90000.0


def test_sums_within_an_operator_are_float32(tmp_path: Path) -> None:
    """Adding 4096 ones in float16 would stop at 2048."""
    x = np.ones((1, 4096), np.float16)
    weight = np.ones((1, 4096), np.float16)
    (got,) = run(tmp_path, lambda x: Builder.linear(x=x, weight=weight), {"x": x})
    assert got == 4096


def stateful(folder: Path) -> Evaluator:
    """A function that writes two rows of a state at a place and gives the state."""
    specs = {
        "x": Builder.TensorSpec((2, 4), types.fp16),
        "at": Builder.TensorSpec((1,), types.int32),
        "s": Builder.StateTensorSpec((8, 4), types.fp16),
    }
    with Function(specs, IOS18) as function:
        x, at, s = (function.inputs[name] for name in ("x", "at", "s"))
        begin = Builder.concat(values=[at, np.zeros(1, np.int32)], axis=0)
        end_at = Builder.add(x=at, y=np.array([2], np.int32))
        end = Builder.concat(values=[end_at, np.array([4], np.int32)], axis=0)
        before = Builder.read_state(input=s)
        after = Builder.slice_update(x=before, update=x, begin=begin, end=end)
        after = Builder.coreml_update_state(state=s, value=after)
        made = Builder.mul(x=after, y=np.float16(2))
        made.name = "y"
        function.set_outputs([made])
    save_package({"main": function}, WeightStore(), folder / "s.mlpackage")
    return Evaluator(read_package(folder / "s.mlpackage"))


def test_states_are_kept_between_runs_and_apart(tmp_path: Path) -> None:
    evaluator = stateful(tmp_path)
    one, other = evaluator.new_state("main"), evaluator.new_state("main")
    x = np.arange(8, dtype=np.float16).reshape(2, 4)
    evaluator.run("main", {"x": x, "at": np.array([1], np.int32)}, one)
    found = evaluator.run("main", {"x": x + 1, "at": np.array([5], np.int32)}, one)["y"]
    wanted = np.zeros((8, 4), np.float32)
    wanted[1:3], wanted[5:7] = 2 * x, 2 * (x + 1)
    assert np.array_equal(found, wanted)
    assert not other["s"].any()


def test_what_was_read_of_a_state_stays_as_it_was(tmp_path: Path) -> None:
    """Before and after an update, and in results that earlier runs gave."""
    specs = {
        "x": Builder.TensorSpec((2, 4), types.fp16),
        "s": Builder.StateTensorSpec((8, 4), types.fp16),
    }
    with Function(specs, IOS18) as function:
        x, s = function.inputs["x"], function.inputs["s"]
        box = {"begin": [1, 0], "end": [3, 4]}
        first = Builder.read_state(input=s)
        again = Builder.read_state(input=s)
        after = Builder.slice_update(x=again, update=x, **box)
        after = Builder.coreml_update_state(state=s, value=after)
        grown = Builder.sub(x=after, y=first)
        after.name, grown.name = "after", "grown"
        function.set_outputs([after, grown])
    save_package({"main": function}, WeightStore(), tmp_path / "s.mlpackage")
    evaluator = Evaluator(read_package(tmp_path / "s.mlpackage"))
    state = evaluator.new_state("main")
    one = evaluator.run("main", {"x": np.full((2, 4), 3, np.float16)}, state)
    kept = one["after"].copy()
    other = evaluator.run("main", {"x": np.full((2, 4), 5, np.float16)}, state)
    assert (one["grown"][1:3] == 3).all()
    assert (other["grown"][1:3] == 2).all()
    assert np.array_equal(one["after"], kept)


@pytest.mark.parametrize("at", [-1, 7, 100])
def test_writing_outside_a_state_is_refused(tmp_path: Path, at: int) -> None:
    evaluator = stateful(tmp_path)
    inputs: dict[str, Array] = {
        "x": np.zeros((2, 4), np.float16),
        "at": np.array([at], np.int32),
    }
    with pytest.raises(BundleError, match="slice is outside"):
        evaluator.run("main", inputs, evaluator.new_state("main"))


@pytest.mark.parametrize("index", [-1, 3])
def test_looking_up_outside_a_table_is_refused(tmp_path: Path, index: int) -> None:
    make = ELEMENTWISE["gather"][0]
    with pytest.raises(BundleError, match="index is outside"):
        run(tmp_path, make, {"x": X, "i": np.array([[index]], np.int32)})


def test_operator_that_the_evaluator_lacks_is_named(tmp_path: Path) -> None:
    with Function({"x": Builder.TensorSpec((2, 3), types.fp32)}, IOS18) as function:
        made = Builder.softmax(x=Builder.tanh(x=function.inputs["x"]), axis=-1)
        function.set_outputs([made])
    save_package({"main": function}, WeightStore(), tmp_path / "one.mlpackage")
    package = read_package(tmp_path / "one.mlpackage")
    assert unknown_operators(package) == ["softmax", "tanh"]
    with pytest.raises(BundleError, match="not known to the evaluator"):
        Evaluator(package)
