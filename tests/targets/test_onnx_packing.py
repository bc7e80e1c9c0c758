"""Integer weights in the graph, byte by byte, and which schemes the target says it carries."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from lorgnette.errors import ConfigError
from lorgnette.export.component import Component, TensorSpec
from lorgnette.export.matrices import matrices_of
from lorgnette.quantize.methods import load_method
from lorgnette.quantize.plan import PLANS, QuantPlan, Rule
from lorgnette.quantize.scheme import FLOAT16, GROUP_SIZES, QuantScheme, ScaleBits
from lorgnette.targets import find_target
from lorgnette.targets.capabilities import Matrix, SchemeRange
from lorgnette.targets.onnx.lowering import MATRICES, TABLES, OnnxCpu
from tests.eager import Eager
from tests.helpers import make_checkpoint, tiny_config
from tests.quantized import quantized_model
from tests.small import Lowered, draw, lower, of_width, plan_of, single, weights_of

Bytes = NDArray[np.uint8]


def in_groups(ranges: Iterable[SchemeRange]) -> list[QuantScheme]:
    """Schemes of groups, but for integer kernels; smaller scales at one size of groups."""
    found = [s for each in ranges for s in each.schemes() if s.is_integer and s.group_size]
    found = [s for s in found if s.activations in ("float", "int8_group")]
    return [s for s in found if s.scale_bits == 32 or s.group_size == 32]


multiplied, gathered = in_groups(MATRICES), in_groups(TABLES)

SCALES: dict[int, tuple[type[np.generic], str]] = {
    32: (np.float32, ""),
    16: (np.float16, ""),
    8: (np.int8, "rows"),
}
"""How scales of so many bits are stored, and what besides."""


def name_of(value: object) -> str | None:
    return value.full_name if isinstance(value, QuantScheme) else None


def parts(lowered: Lowered) -> dict[str, NDArray[np.generic]]:
    """Codes, scales and zero points as they stand in the weight file."""
    model = onnx.load(lowered.folder / lowered.report.graph)
    return {
        tensor.name.rpartition(".")[2]: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if not tensor.name.startswith("const_")
    }


def unpacked(packed: Bytes, bits: int, count: int) -> Bytes:
    """The first `count` codes of every row, bit by bit: code i starts at bit i * bits."""
    rows = packed.reshape(len(packed), -1)
    stream = np.unpackbits(rows, axis=1, bitorder="little")[:, : count * bits]
    weights = 1 << np.arange(bits)
    codes: Bytes = (stream.reshape(len(rows), count, bits) * weights).sum(axis=2).astype(np.uint8)
    return codes


def plan_for(scheme: QuantScheme, method: str = "rtn") -> QuantPlan:
    return QuantPlan("one", "", (Rule("*", scheme, method),))


def table_of(columns: int) -> Component:
    return single(
        lambda: nn.Embedding(70, columns),
        (TensorSpec("ids", torch.int64, (1, "T")),),
        (TensorSpec("y", torch.float32, (1, "T", columns)),),
        name="token_embedding",
        axes={"T": (1, 64)},
    )


@pytest.mark.parametrize("scheme", multiplied, ids=name_of)
def test_a_matrix_is_packed_to_the_bit_and_multiplied(tmp_path: Path, scheme: QuantScheme) -> None:
    columns, rows = 328, 9  # 328 fills the last group of none but 8
    component = of_width(lambda: nn.Linear(columns, rows, bias=False), columns)
    weights = weights_of(component)
    lowered = lower(tmp_path, component, weights, plan_for(scheme))
    made = load_method("rtn").quantize(weights["weight"].numpy(), scheme)
    groups = made.scales.shape[1]
    stored = parts(lowered)
    more = {"zeros"} if not scheme.symmetric else set()
    assert set(stored) == {"codes", "scales"} | more | ({"rows"} & {SCALES[scheme.scale_bits][1]})
    assert stored["codes"].shape == (rows, groups, scheme.group_size * scheme.bits // 8)
    codes = unpacked(stored["codes"].astype(np.uint8), scheme.bits, made.codes.shape[1])
    assert np.array_equal(codes, made.codes)
    assert stored["scales"].dtype == SCALES[scheme.scale_bits][0]
    number = stored.get("rows", np.array(1)).astype(np.float32)
    assert np.array_equal(stored["scales"].astype(np.float32) * number, made.scales)
    if not scheme.symmetric:
        assert stored["zeros"].shape == (rows, -(-groups * scheme.bits // 8))
        zeros = unpacked(stored["zeros"].astype(np.uint8), scheme.bits, groups)
        assert np.array_equal(zeros, made.zero_points)
    total = sum(array.nbytes for array in stored.values())
    assert lowered.report.weight_bytes == {scheme.form: total}
    assert scheme.stored_bytes(rows, columns) == total

    matrix = made.dequantize().astype(np.float64)
    for length in (1, 17):
        x = draw(1, length, columns)
        wanted = x.astype(np.float64) @ matrix.T
        error = np.linalg.norm(lowered.run(x)[0] - wanted) / np.linalg.norm(wanted)
        assert error < (1e-6 if scheme.activations == "float" else 0.05)
        if scheme.activations == "int8_group" and scheme.bits > 2:
            assert error > 1e-5  # so activations are rounded indeed


@pytest.mark.parametrize("scheme", gathered, ids=name_of)
def test_a_table_is_packed_to_the_bit_and_gathered_exactly(
    tmp_path: Path, scheme: QuantScheme
) -> None:
    columns = 256
    component = table_of(columns)
    weights = weights_of(component)
    weights["weight"][5] = 0
    lowered = lower(tmp_path, component, weights, plan_for(scheme))
    made = load_method("rtn").quantize(weights["weight"].numpy(), scheme)
    stored = parts(lowered)
    assert stored["codes"].shape == (70, columns * scheme.bits // 8)
    codes = unpacked(stored["codes"].astype(np.uint8), scheme.bits, columns)
    assert np.array_equal(codes, made.codes)
    ids = np.array([[0, 5, 69, 17, 17, 1]])
    assert np.array_equal(lowered.run(ids)[0][0], made.dequantize()[ids[0]])


@pytest.mark.parametrize(
    ("scale_bits", "told"),
    [(16, "no float16 numbers"), (8, "not whole multiples of one number")],
)
def test_scales_that_were_not_rounded_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale_bits: ScaleBits, told: str
) -> None:
    """A method that forgets to round them would have chosen its codes for other scales."""
    monkeypatch.setattr("lorgnette.quantize.methods.rtn.stored_scales", lambda scales, _: scales)
    scheme = QuantScheme(bits=4, group_size=32, scale_bits=scale_bits)
    component = of_width(lambda: nn.Linear(128, 8, bias=False), 128)
    with pytest.raises(ConfigError, match=told):
        lower(tmp_path, component, weights_of(component), plan_for(scheme))


@pytest.mark.parametrize("method", ["mse", "hqq"])
def test_codes_are_those_of_the_rules_method(tmp_path: Path, method: str) -> None:
    component = of_width(lambda: nn.Linear(64, 8, bias=False))
    weights = weights_of(component)
    plan = plan_of(4, symmetric=False, method=method)
    stored = parts(lower(tmp_path, component, weights, plan))
    made = load_method(method).quantize(weights["weight"].numpy(), plan.rules[0].scheme)
    assert np.array_equal(unpacked(stored["codes"].astype(np.uint8), 4, 64), made.codes)
    assert np.array_equal(stored["scales"], made.scales)


RUN = """
import sys
import numpy, onnxruntime
for folder in sys.argv[1:]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        folder + "/graph.onnx", options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    out = session.run(None, {name: numpy.load(folder + "/in.npy")})[0]
    numpy.save(folder + "/out.npy", out)
print(onnxruntime.__version__)
"""


def test_the_oldest_engine_gathers_and_multiplies_all_of_it(
    tmp_path: Path, ort_floor_env: dict[str, str]
) -> None:
    """What the target says it carries, in the oldest engine that it says it runs in."""
    wanted: dict[Path, NDArray[np.float64]] = {}
    x, ids = draw(1, 3, 328), np.array([[0, 5, 69, 17]])
    for table in (False, True):
        component = table_of(256) if table else of_width(lambda: nn.Linear(328, 9, bias=False), 328)
        for scheme in gathered if table else multiplied:
            folder = tmp_path / f"{scheme.form}{scheme.activations}{table}"
            weights = weights_of(component)
            lowered = lower(folder, component, weights, plan_for(scheme))
            shutil.copytree(lowered.folder / "graphs", folder, dirs_exist_ok=True)
            (folder / Path(lowered.report.graph).name).rename(folder / "graph.onnx")
            np.save(folder / "in.npy", ids if table else x)
            matrix = load_method("rtn").quantize(weights["weight"].numpy(), scheme).dequantize()
            exact = matrix.astype(np.float64)
            wanted[folder] = exact[ids] if table else x.astype(np.float64) @ exact.T
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
    for folder, out in wanted.items():
        error = np.linalg.norm(np.load(folder / "out.npy") - out) / np.linalg.norm(out)
        assert error < (0.05 if "int8_group" in folder.name else 1e-6), folder.name


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        ((Rule("decoder/*", QuantScheme(bits=4, group_size=32)),), {"weight"}),
        ((Rule("decoder/*", QuantScheme(bits=32)),), set()),
        ((Rule("vision_encoder/*", QuantScheme(bits=4, group_size=32)),), set()),
    ],
    ids=["integers", "float", "no rule"],
)
def test_a_kernel_that_a_rule_wanted_as_integers_is_told(
    tmp_path: Path, rules: tuple[Rule, ...], kept: set[str]
) -> None:
    component = single(
        lambda: nn.Conv2d(3, 4, 2, bias=False),
        (TensorSpec("x", torch.float32, (1, 3, 6, 6)),),
        (TensorSpec("y", torch.float32, (1, 4, 5, 5)),),
    )
    lowered = lower(tmp_path, component, weights_of(component), QuantPlan("p", "", rules))
    assert set(lowered.report.kept_in_float) == kept


# A table that is the head, too


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Eager:
    return Eager(make_checkpoint(tmp_path_factory.mktemp("checkpoint"), tiny_config(), tied=True))


INT4Z = QuantScheme(bits=4, group_size=32, symmetric=False)
ROUNDED = QuantScheme(bits=4, group_size=32, symmetric=False, activations="int8_group")


@pytest.mark.parametrize(
    ("head", "method", "shared"),
    [
        (INT4Z, "rtn", True),
        (
            QuantScheme(bits=4, group_size=32, symmetric=False, activations="int8_group"),
            "rtn",
            True,
        ),
        (INT4Z, "mse", False),
        (QuantScheme(bits=4, group_size=32), "rtn", False),
        (QuantScheme(bits=8, group_size=32, symmetric=False), "rtn", False),
        (QuantScheme(bits=4, group_size=16, symmetric=False), "rtn", False),
        (QuantScheme(bits=4, group_size=32, symmetric=False, scale_bits=16), "rtn", False),
    ],
    ids=["equal", "rounded activations", "method", "symmetric", "bits", "groups", "scales"],
)
def test_table_and_head_are_one_where_they_hold_the_same(
    tmp_path: Path, tied: Eager, head: QuantScheme, method: str, shared: bool
) -> None:
    rules = (Rule("decoder/head.weight", head, method), Rule("*", INT4Z))
    plan = QuantPlan("p", "", rules)
    model = quantized_model(tmp_path, tied.components, tied.sources, plan)
    with OnnxCpu().open(tmp_path) as lowering:
        for name in ("token_embedding", "decoder"):
            lowering.add(tied.components[name], tied.programs[name], model.sources[name])
    places: dict[str, list[tuple[str, str]]] = {}
    for file in ("token_embedding", "decoder"):
        model = onnx.load(tmp_path / "graphs" / f"{file}.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            if tensor.name.startswith(("table.", "head.")):
                entry = {e.key: e.value for e in tensor.external_data}
                part = tensor.name.rpartition(".")[2]
                places.setdefault(part, []).append((entry["offset"], entry["length"]))
    assert {len(set(found)) for found in places.values() if len(found) == 2} == {1 if shared else 2}
    assert set(places) == {"codes", "scales", "zeros"}


# What can be carried


def matrix(*, columns: int = 96, gathered: bool = False, name: str = "a.weight") -> Matrix:
    return Matrix(component="decoder", name=name, rows=8, columns=columns, gathered=gathered)


def problems(scheme: QuantScheme, *matrices: Matrix) -> str:
    return "; ".join(find_target("onnx-cpu").check(matrices, plan_for(scheme)))


@pytest.mark.parametrize(
    ("scheme", "nearest"),
    [
        (QuantScheme(bits=3, group_size=32), "int4g32, "),
        (QuantScheme(bits=3, group_size=128, symmetric=False), "int4g128z, "),
        (QuantScheme(bits=3, group_size=32, activations="int8_group"), "int4g32/int8_group, "),
        (QuantScheme(bits=4), "int4g128, "),
        (QuantScheme(bits=4, group_size=256), "int4g128, "),
        (QuantScheme(bits=2, group_size=8), "int2g16, "),
        (QuantScheme(bits=4, group_size=32, activations="int8_token"), "int4g32b15/int8_token, "),
        (QuantScheme(bits=3, group_size=32, scale_bits=16), "int4g32h, "),
        (QuantScheme(bits=8, group_size=32, activations="int8_static"), "int8g32/int8_group, "),
        (QuantScheme(bits=8, symmetric=False, activations="int8_token"), "int8c/int8_token, "),
        (QuantScheme(bits=4, palette=True), "int4g128, "),
        (QuantScheme(bits=6, palette=True, table_rows=16), "int8g128, "),
    ],
    ids=name_of,
)
def test_a_scheme_that_cannot_be_multiplied_is_refused_with_the_nearest(
    scheme: QuantScheme, nearest: str
) -> None:
    told = problems(scheme, matrix(), matrix(name="b.weight"))
    assert told.startswith("'decoder/a.weight' and 1 more cannot be multiplied as " + scheme.form)
    assert nearest in told.partition("nearest: ")[2]


def test_two_bits_are_multiplied_and_not_gathered() -> None:
    scheme = QuantScheme(bits=2, group_size=32)
    assert problems(scheme, matrix()) == ""
    told = problems(scheme, matrix(), matrix(gathered=True, name="table.weight"))
    assert told == (
        "'decoder/table.weight' cannot be gathered as int2g32; nearest: int4g32, int4g16, int4g64"
    )


def test_what_a_scheme_says_of_activations_does_not_matter_to_a_table() -> None:
    scheme = QuantScheme(bits=4, group_size=32, activations="int8_group")
    assert problems(scheme, matrix(gathered=True)) == ""


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_a_table_end_in_whole_groups_and_bytes(bits: int, symmetric: bool) -> None:
    scheme = QuantScheme(bits=bits, group_size=32, symmetric=symmetric)
    assert problems(scheme, matrix(columns=128, gathered=True)) == ""
    assert "not a multiple of 32" in problems(scheme, matrix(columns=100, gathered=True))
    # Three groups: their zero points of four bits end in the middle of a byte.
    odd = problems(scheme, matrix(columns=96, gathered=True))
    assert ("do not fill whole bytes" in odd) == (bits == 4 and not symmetric)
    assert problems(scheme, matrix(columns=100)) == ""


def test_named_plans_are_carried() -> None:
    capabilities = find_target("onnx-cpu").capabilities
    assert all(capabilities.takes(plan) for plan in PLANS.values())
    assert not capabilities.takes(plan_for(QuantScheme(bits=3, group_size=32)))


def test_ranges_tell_what_they_hold() -> None:
    assert str(SchemeRange(bits=(16, 32))) == "float16/32"
    told = str(SchemeRange(bits=(4, 8), groups=(0, 32), symmetric=(True, False)))
    assert told == "int4/8 groups channel/32, symmetric or with zero points, activations float"
    groups = SchemeRange(bits=(4, 8), groups=GROUP_SIZES, symmetric=(True, False))
    assert len(set(groups.schemes())) == 2 * len(GROUP_SIZES) * 2


def test_matrices_are_what_a_model_multiplies_by_and_gathers_from(tied: Eager) -> None:
    found = {str(m): m for m in matrices_of(tied.components.values())}
    tables = [name for name, m in found.items() if m.gathered]
    assert tables == ["token_embedding/table.weight"]
    spec = tied.spec
    head = found["decoder/head.weight"]
    assert (head.rows, head.columns) == (spec.text.vocab_size, spec.text.hidden_size)
    assert len(found) == 1 + (4 * spec.text.layers + 1) + (6 * spec.vision.layers + 2)
    told = find_target("onnx-cpu").check(list(found.values()), plan_for(FLOAT16))
    assert told == []
