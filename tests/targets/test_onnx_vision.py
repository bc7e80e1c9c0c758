"""What vision towers and projectors are made of, one by one and as whole encoders."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional

from lorgnette.errors import ConfigError
from lorgnette.export.component import Component, TensorSpec, VisionEncoder
from lorgnette.export.layers.projectors import ConcatProjector, LdpProjector, LdpV2Projector
from lorgnette.export.layers.vision import ClipTower, SiglipTower
from lorgnette.export.trace import build_module, trace
from lorgnette.export.weights import load_module, module_shapes
from lorgnette.quantize.plan import PLANS
from lorgnette.spec import VisionSpec
from lorgnette.targets.onnx.lowering import OnnxCpu
from tests.eager import StoredSource, random_tiles
from tests.projector_weights import random_tensors
from tests.quantized import quantized_source
from tests.rounding import round_inputs
from tests.small import (
    WIDTH,
    WITHOUT_PICTURES,
    Array,
    Call,
    Function,
    Lowered,
    check,
    draw,
    lower,
    of_width,
    session,
    single,
    tensor_folder,
)

FUNCTIONS: dict[str, Function] = {
    "relu": functional.relu,
    "sigmoid": torch.sigmoid,
    "hard sigmoid": functional.hardsigmoid,
    "hard swish": functional.hardswish,
    "quick gelu": lambda x: x * torch.sigmoid(x * 1.702),
    "quick gelu, gate first": lambda x: torch.sigmoid(x * 1.702) * x,
    "gated by another": lambda x: (x + 1) * torch.sigmoid(x * 1.702),
    "sigmoid used twice": lambda x: x * (gate := torch.sigmoid(x * 1.702)) + gate,
    "product used twice": lambda x: x * torch.sigmoid(scaled := x * 1.702) + scaled,
    "scale of each channel": lambda x: x * torch.sigmoid(x * x[:, :1]),
    "mean of tokens": lambda x: x.mean(dim=1, keepdim=True),
    "mean of tokens, axis dropped": lambda x: x.mean(dim=1),
    "mean of two axes": lambda x: x.mean(dim=(1, -1), keepdim=True),
    "zeros in front": lambda x: functional.pad(x, (0, 0, 1, 0)),
    "zeros around": lambda x: functional.pad(x, (3, 4, 1, 2)),
    "new axis": lambda x: x.unsqueeze(1),
    "new last axis": lambda x: x.unsqueeze(-1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(tmp_path: Path, name: str) -> None:
    component = of_width(lambda: Call(FUNCTIONS[name]))
    lowered = check(tmp_path, component, 3 * draw(1, 5, WIDTH))
    for length in (1, 64):
        x = 3 * draw(1, length, WIDTH)
        wanted = FUNCTIONS[name](torch.from_numpy(x)).numpy()
        assert np.abs(lowered.run(x)[0] - wanted).max() <= 2e-6


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_quick_gelu_becomes_one_operator_and_nothing_else_does(tmp_path: Path, name: str) -> None:
    lowered = check(tmp_path, of_width(lambda: Call(FUNCTIONS[name])), draw(1, 3, WIDTH))
    fused = {"com.microsoft::QuickGelu": 1}
    graph = onnx.load(lowered.folder / lowered.report.graph, load_external_data=False).graph
    read = {value for node in graph.node for value in node.input}
    assert {initializer.name for initializer in graph.initializer} <= read
    if name.startswith("quick gelu"):
        assert lowered.report.operators == fused
    else:
        assert not set(fused) & set(lowered.report.operators)


def of_pictures(build: Callable[[], nn.Module], channels: int = 8, side: int = 24) -> Component:
    """A component from float32 `[G, channels, side, side]` to another picture."""
    return single(
        build,
        (TensorSpec("x", torch.float32, ("G", channels, side, side)),),
        (TensorSpec("y", torch.float32, ("G", channels, "rows", "columns")),),
        axes={"G": (1, 8)},
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), ((2, 1), (0, 2))])
def test_convolutions(
    tmp_path: Path,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
    groups: int,
    bias: bool,
) -> None:
    component = of_pictures(
        lambda: nn.Conv2d(8, 8, 3, stride=stride, padding=padding, groups=groups, bias=bias)
    )
    # Kernels are drawn around 0.6, up to 72 of them a sum.
    lowered = check(tmp_path, component, draw(3, 8, 24, 24), tolerance=2e-5)
    assert lowered.report.operators == {"ai.onnx::Conv": 1}
    if stride == 2:
        assert lowered.run(draw(2, 8, 24, 24))[0].shape == (2, 8, 12, 12)


@pytest.mark.parametrize("plan", WITHOUT_PICTURES)
def test_kernels_stay_float_and_are_named(tmp_path: Path, plan: str) -> None:
    component = of_pictures(lambda: nn.Conv2d(8, 8, 3, groups=8))
    shapes = module_shapes(build_module(component))
    report = lower(tmp_path, component, random_tensors(shapes), PLANS[plan]).report
    assert report.weight_bytes == {"float32": 4 * 8 * 10}
    if plan == "fp32":
        assert report.kept_in_float == {}
    else:
        assert list(report.kept_in_float) == ["weight"]
        assert "convolution" in report.kept_in_float["weight"]


@pytest.mark.parametrize("side", [2, (2, 4)])
def test_means_of_patches(tmp_path: Path, side: int | tuple[int, int]) -> None:
    component = of_pictures(lambda: Call(lambda x: functional.avg_pool2d(x, side)))
    lowered = check(tmp_path, component, draw(3, 8, 24, 24))
    assert lowered.report.operators == {"ai.onnx::AveragePool": 1}


REFUSED: dict[str, tuple[Function, str]] = {
    "padding with ones": (lambda x: functional.pad(x, (0, 1), value=1.0), "not constant"),
    "padding with the border": (
        lambda x: functional.pad(x, (1, 1, 1, 1), mode="replicate"),
        "not constant",
    ),
    "padding by the batch": (lambda x: functional.pad(x, (0, x.shape[0])), "not constant"),
    "overlapping pool": (lambda x: functional.avg_pool2d(x, 3, 2), "side by side"),
    "pool with a border": (lambda x: functional.avg_pool2d(x, 3, 3, 1), "side by side"),
    "mean of another dtype": (lambda x: x.mean(1, dtype=torch.float16), "extra arguments"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_lowered_is_told(tmp_path: Path, name: str) -> None:
    function, told = REFUSED[name]
    with pytest.raises(ConfigError, match=told):
        lower(
            tmp_path,
            of_pictures(lambda: Call(function)),
            {"unused": torch.ones(1)},
            PLANS["fp32"],
        )


def numbers(side: int, patch: int) -> VisionSpec:
    """A tower whose widths fill no group of 32."""
    return VisionSpec(
        hidden_size=40,
        intermediate_size=72,
        layers=2,
        heads=2,
        image_size=side,
        patch_size=patch,
        norm_eps=1e-5,
    )


CLIP, SIGLIP = numbers(96, 4), numbers(81, 3)

ENCODERS: dict[str, tuple[VisionSpec, int, Callable[[], VisionEncoder]]] = {
    "clip-ldp": (CLIP, 144, lambda: VisionEncoder(ClipTower(CLIP), LdpProjector(40, 48, 24))),
    "clip-ldpv2": (CLIP, 144, lambda: VisionEncoder(ClipTower(CLIP), LdpV2Projector(40, 48, 24))),
    "siglip-concat": (
        SIGLIP,
        81,
        lambda: VisionEncoder(SiglipTower(SIGLIP), ConcatProjector(40, 56, 48, 9)),
    ),
}
KERNELS = {
    "clip-ldp": {f"projector.block{i}.depthwise.weight" for i in (1, 2)},
    "clip-ldpv2": {"projector.depthwise.weight"},
    "siglip-concat": set[str](),
}


def encoder(name: str) -> Component:
    """One of the encoders as a component."""
    spec, tokens, build = ENCODERS[name]
    side = spec.image_size
    return single(
        build,
        (TensorSpec("tiles", torch.uint8, ("G", 3, side, side)),),
        (TensorSpec("image_tokens", torch.float32, ("G", tokens, 48)),),
        name="vision_encoder",
        axes={"G": (1, 64)},
    )


@pytest.fixture(scope="module", params=list(ENCODERS))
def traced(request: pytest.FixtureRequest) -> tuple[str, Component, ExportedProgram]:
    """An encoder, traced once for all plans."""
    component = encoder(request.param)
    return request.param, component, trace(component)


def encoder_weights(component: Component) -> dict[str, Tensor]:
    """Random weights with pixels as published models scale them."""
    weights = random_tensors(module_shapes(build_module(component)))
    for name, value in (("rescale", 1 / 255), ("mean", 0.45), ("std", 0.27)):
        weights[f"tower.embed.{name}"].fill_(value)
    return weights


@pytest.mark.parametrize("plan", WITHOUT_PICTURES)
def test_encoders(
    traced: tuple[str, Component, ExportedProgram], plan: str, tmp_path: Path
) -> None:
    name, component, program = traced
    spec, tokens, _ = ENCODERS[name]
    shipped, module = lower_encoder(tmp_path, component, program, plan)
    emulated = copy.deepcopy(module)
    round_inputs(emulated, PLANS[plan], component.name)
    rounds = plan in {"int8", "int4-fast"}
    seen: list[tuple[Array, Array, Array]] = []
    for count in (1, 3):
        tiles = random_tiles(count, spec.image_size)
        with torch.no_grad():
            wanted = module(torch.from_numpy(tiles)).numpy()
            rounded = emulated(torch.from_numpy(tiles)).numpy()
        (got,) = exact_twin(shipped).run(tiles)
        assert got.shape == wanted.shape == (count, tokens, 48)
        assert wanted.std() > 0.3
        assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()
        seen.append((shipped.run(tiles)[0], rounded, wanted))
    if rounds:
        # One value that tips may reach every token of its tile: some tile of the four is spared.
        assert agree_where_nothing_tipped(
            *(np.concatenate(each) for each in zip(*seen, strict=True))
        )
    report = shipped.report
    assert set(report.kept_in_float) == (set() if plan == "fp32" else KERNELS[name])
    operators = report.operators
    clip = name.startswith("clip")
    assert operators.get("com.microsoft::QuickGelu", 0) == (spec.layers if clip else 0)
    assert "ai.onnx::Sigmoid" not in operators
    assert operators.get("ai.onnx::Conv", 0) == len(KERNELS[name])
    # Nothing is repeated for every tile; the zero points of positions are one number each.
    assert operators.get("ai.onnx::Expand", 0) == operators.get("ai.onnx::QuantizeLinear", 0)
    assert ("com.microsoft::MatMulIntegerToFloat" in operators) == rounds


RUN = """
import sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
numpy.save(sys.argv[3], session.run(None, {"tiles": numpy.load(sys.argv[2])})[0])
print(onnxruntime.__version__)
"""


@pytest.mark.parametrize("plan", ["fp16", "int8"])
def test_the_oldest_engine_runs_encoders(
    traced: tuple[str, Component, ExportedProgram],
    plan: str,
    tmp_path: Path,
    ort_floor_env: dict[str, str],
) -> None:
    name, component, program = traced
    shipped, module = lower_encoder(tmp_path, component, program, plan)
    tiles = random_tiles(2, ENCODERS[name][0].image_size)
    np.save(tmp_path / "in.npy", tiles)

    def run(lowered: Lowered) -> Array:
        """The image tokens by the oldest engine."""
        files = [lowered.folder / lowered.report.graph, tmp_path / "in.npy", tmp_path / "out.npy"]
        done = subprocess.run(
            [sys.executable, "-c", RUN, *map(str, files)],
            env=ort_floor_env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == OnnxCpu.capabilities.engine_min_version
        return np.load(files[2])  # type: ignore[no-any-return]

    with torch.no_grad():
        wanted = module(torch.from_numpy(tiles)).numpy()
    assert np.abs(run(exact_twin(shipped)) - wanted).max() <= 1e-4 * np.abs(wanted).max()
    if plan == "int8":
        (newest,), oldest = shipped.run(tiles), run(shipped)
        assert agree_where_nothing_tipped(oldest, newest, wanted)


def agree_where_nothing_tipped(got: Array, rounded: Array, unrounded: Array) -> bool:
    """Whether image tokens are those of rounded activations.

    Another order of sums tips a value over to the next integer now and then, which moves others
    after it: in all the two differ by less than rounding costs, and some tokens are the same.
    """
    lost, off = (np.linalg.norm(got - other, axis=-1) for other in (unrounded, rounded))
    size = np.linalg.norm(unrounded, axis=-1)
    cost = float(np.linalg.norm(lost) / np.linalg.norm(size))
    same = float((off / size).min()) < 1e-5 < float((lost / size).min())
    return bool(same and np.linalg.norm(off) < np.linalg.norm(lost) and cost < 0.05)


def exact_twin(lowered: Lowered) -> Lowered:
    """The graph that has the same weights and rounds no activations."""
    graph = Path(lowered.report.graph)
    twin = graph.with_name(f"exact_{graph.name}")
    OnnxCpu().write_exact(lowered.folder / graph, lowered.folder / twin)
    report = msgspec.structs.replace(lowered.report, graph=str(twin))
    return Lowered(lowered.folder, report, session(lowered.folder / twin))


def lower_encoder(
    folder: Path, component: Component, program: ExportedProgram, plan: str
) -> tuple[Lowered, nn.Module]:
    """The graph, and the eager module with weights rounded as the plan says."""
    checkpoint = tensor_folder(folder / "checkpoint", encoder_weights(component))
    shapes = module_shapes(build_module(component))
    source = StoredSource(checkpoint, shapes, component.rules)
    source.component, source.plan = component.name, PLANS["fp32"]
    out = folder / "bundle"
    out.mkdir()
    with OnnxCpu().open(out) as lowering:
        rounded = quantized_source(folder, component, source, PLANS[plan])
        report = lowering.add(component, program, rounded)
    source.plan = PLANS[plan]
    module = load_module(build_module(component), source)
    return Lowered(out, report, session(out / report.graph)), module
