"""Vision towers in float32, with 8-bit weights alone, and on integer kernels: time side by side.

    python -m benchmarks.vision_matmul [--runs 9] [--threads 1] [--encoder] [--layers 12]

Without `--encoder` single multiplications of the shapes of SigLIP base and So400m, each with its
bias; with it a whole vision encoder of SmolVLM-256M's shape with random weights. The candidates
run in turns, so that a busy machine slows all of them alike; the ratios of medians are to float32.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from lorgnette.export.component import Component, TensorSpec, VisionEncoder
from lorgnette.export.layers.projectors import PixelShuffleProjector
from lorgnette.export.layers.vision import SiglipTower
from lorgnette.export.trace import build_module
from lorgnette.export.weights import module_shapes
from lorgnette.quantize.methods import rtn
from lorgnette.quantize.plan import PLANS, SMALL_VISION, QuantPlan, Rule
from lorgnette.quantize.scheme import FLOAT32, InputRange, QuantScheme, QuantTensor
from lorgnette.spec import VisionSpec
from tests.projector_weights import random_tensors
from tests.small import Session, lower, of_width, session, single, weights_of

SHAPES = (
    (1024, 768, 768),
    (1024, 768, 3072),
    (1024, 3072, 768),
    (64, 12288, 576),
    (729, 1152, 1152),
    (729, 1152, 4304),
    (729, 4304, 1152),
)
"""Positions, columns, rows."""
SCHEMES: dict[str, QuantScheme] = {
    "float32": FLOAT32,
    "int8g32, float": QuantScheme(bits=8, group_size=32),
    "int8g32, rounded by group": QuantScheme(bits=8, group_size=32, activations="int8_group"),
    "int4g32, rounded by group": QuantScheme(bits=4, group_size=32, activations="int8_group"),
    "int8c, rounded by token": QuantScheme(bits=8, activations="int8_token"),
    "int8cn, rounded by token": QuantScheme(bits=8, activations="int8_token", narrow=True),
    "int8c, static": QuantScheme(bits=8, activations="int8_static"),
    "int4c, rounded by token": QuantScheme(bits=4, activations="int8_token"),
    "int4g32b15, rounded by token": QuantScheme(
        bits=4, group_size=32, activations="int8_token", scale_bits=8
    ),
    "int4g32b15, static": QuantScheme(
        bits=4, group_size=32, activations="int8_static", scale_bits=8
    ),
}
STATIC_RANGE = InputRange(scale=8 / 255, zero_point=128)
"""Of all static activations here; speed does not depend on it."""
BASE = VisionSpec(
    hidden_size=768,
    intermediate_size=3072,
    layers=12,
    heads=12,
    image_size=512,
    patch_size=16,
    norm_eps=1e-6,
)
Feeds = Mapping[str, NDArray[np.generic]]


class RangedPlan(QuantPlan):
    """A plan whose matrices all come with one range of their inputs."""

    def quantize(self, component: str, parameter: str, weight: NDArray[np.float32]) -> QuantTensor:
        """Codes and scales, and the range."""
        return replace(super().quantize(component, parameter, weight), input_range=STATIC_RANGE)


def plan_of(scheme: QuantScheme) -> QuantPlan:
    """One scheme for every matrix."""
    return RangedPlan("one", "one scheme for all", (Rule("*", scheme),))


def integers(scheme: QuantScheme) -> QuantPlan:
    """A scheme for all but patches of pixels, as the named plans have it."""
    return RangedPlan("one", "", (*SMALL_VISION, Rule("*", scheme)))


def by_tensor(weight: NDArray[np.float32], bias: NDArray[np.float32]) -> bytes:
    """A multiplication whose input gets one scale and zero point for all of its positions."""
    made = rtn.quantize(weight, QuantScheme(bits=8))
    rows, columns = weight.shape
    constants = {
        "codes": made.codes.T.copy(),
        "scales": made.scales[:, 0],
        "middle": np.array(128, np.uint8),
        "bias": bias,
    }
    domain = "com.microsoft"
    node = helper.make_node("DynamicQuantizeMatMul", ["x", *constants], ["y"], domain=domain)
    graph = helper.make_graph(
        [node],
        "by_tensor",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "T", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "T", rows])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(domain, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return model.SerializeToString()


def compare(sessions: Mapping[str, Session], feeds: Feeds, runs: int) -> None:
    """Prints the median time of each, and how far its output is from the first one's."""
    wanted = None
    errors = {}
    for name, engine in sessions.items():  # warms up, too
        (got,) = engine.run(None, feeds)
        wanted = got if wanted is None else wanted
        errors[name] = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(runs):
        for name, engine in sessions.items():
            began = time.perf_counter()
            engine.run(None, feeds)
            times[name].append(1e3 * (time.perf_counter() - began))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    first = next(iter(medians.values()))
    for name, median in medians.items():
        print(f"  {name:30}{median:10.1f} ms {median / first:8.2f} x   error {errors[name]:.1e}")


def multiplications(folder: Path, runs: int, threads: int) -> None:
    """Single matrices."""
    for positions, columns, rows in SHAPES:
        print(f"\n{positions} x {columns} -> {rows}")
        component = of_width(lambda n=columns, m=rows: nn.Linear(n, m), columns)  # type: ignore[misc]
        weights = weights_of(component)
        sessions = {}
        for name, scheme in SCHEMES.items():
            place = folder / f"{columns}-{rows}-{name}"
            lowered = lower(place, component, weights, plan_of(scheme))
            sessions[name] = session(lowered.folder / lowered.report.graph, threads)
        graph = by_tensor(weights["weight"].numpy(), weights["bias"].numpy())
        sessions["int8c, rounded by tensor"] = session(graph, threads)
        x = np.random.default_rng(0).standard_normal((1, positions, columns), dtype=np.float32)
        compare(sessions, {"x": x}, runs)


def encoder_component(spec: VisionSpec, width: int, scale: int) -> Component:
    """A vision encoder as SmolVLM's, `width` wide behind its projector."""
    grid = spec.grid
    tokens = (grid // scale) ** 2
    return single(
        lambda: VisionEncoder(
            SiglipTower(spec), PixelShuffleProjector(spec.hidden_size, width, grid, scale)
        ),
        (TensorSpec("tiles", torch.uint8, ("G", 3, spec.image_size, spec.image_size)),),
        (TensorSpec("image_tokens", torch.float32, ("G", tokens, width)),),
        name="vision_encoder",
        axes={"G": (1, 64)},
    )


def encoder(folder: Path, runs: int, threads: int, layers: int) -> None:
    """A whole encoder, one tile at a time."""
    spec = VisionSpec(**{**{f: getattr(BASE, f) for f in BASE.__struct_fields__}, "layers": layers})
    component = encoder_component(spec, 576, 4)
    weights = random_tensors(module_shapes(build_module(component)))
    for name, value in (("rescale", 1 / 255), ("mean", 0.5), ("std", 0.5)):
        weights[f"tower.embed.{name}"].fill_(value)
    plans = {
        "fp32": PLANS["fp32"],
        "8-bit weights alone": plan_of(SCHEMES["int8g32, float"]),
        **{name: integers(SCHEMES[name]) for name in SCHEMES if name.startswith(("int8c", "int4"))},
    }
    sessions = {}
    for name, plan in plans.items():
        lowered = lower(folder / name, component, weights, plan)
        began = time.perf_counter()
        sessions[name] = session(lowered.folder / lowered.report.graph, threads)
        megabytes = sum(lowered.report.weight_bytes.values()) / 1e6
        print(f"  {name:30}{megabytes:8.1f} MB   loads in {time.perf_counter() - began:.2f} s")
    tiles = np.random.default_rng(0).integers(0, 256, (1, 3, 512, 512), dtype=np.uint8)
    print(f"\nvision encoder, {layers} layers")
    compare(sessions, {"tiles": tiles}, runs)


def main() -> None:
    """Reads the command line and prints the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--encoder", action="store_true", help="a whole encoder")
    parser.add_argument("--layers", type=int, default=12, help="of the encoder")
    arguments = parser.parse_args()
    print(f"{arguments.threads} threads, load average {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        if arguments.encoder:
            encoder(Path(folder), arguments.runs, arguments.threads, arguments.layers)
        else:
            multiplications(Path(folder), arguments.runs, arguments.threads)


if __name__ == "__main__":
    main()
