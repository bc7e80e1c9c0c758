"""The weight file: every tensor once, aligned, nothing else; and that exports repeat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from lorgnette.errors import EXIT_WRONG_INPUT, ConfigError
from lorgnette.export.component import TensorSpec
from lorgnette.export.matrices import matrices_of
from lorgnette.quantize.plan import PLANS, QuantPlan
from lorgnette.targets import all_targets, find_target
from lorgnette.targets.onnx.lowering import OnnxCpu
from lorgnette.targets.onnx.weight_file import PAGE_BYTES, SMALL_ALIGN_BYTES, WeightFile
from lorgnette.targets.target import LoweredComponent
from tests.eager import Eager
from tests.helpers import make_checkpoint, tiny_config
from tests.quantized import quantized_model
from tests.small import WITHOUT_PICTURES, lower, single, weights_of

Place = tuple[int, int]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Eager:
    return Eager(make_checkpoint(tmp_path_factory.mktemp("checkpoint"), tiny_config()))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Eager:
    return Eager(make_checkpoint(tmp_path_factory.mktemp("checkpoint"), tiny_config(), tied=True))


def lowered(folder: Path, eager: Eager, plan: QuantPlan) -> dict[str, LoweredComponent]:
    folder.mkdir()
    model = quantized_model(folder.parent, eager.components, eager.sources, plan)
    with OnnxCpu().open(folder) as lowering:
        return {
            name: lowering.add(component, eager.programs[name], model.sources[name])
            for name, component in eager.components.items()
        }


def places(folder: Path) -> dict[str, Place]:
    """Offset and length of every external initialiser, by `component/name`."""
    found = {}
    for file in sorted((folder / "graphs").glob("*.onnx")):
        model = onnx.load(file, load_external_data=False)
        for tensor in model.graph.initializer:
            entry = {e.key: e.value for e in tensor.external_data}
            if entry:
                assert entry["location"] == "weights.bin"
                key = f"{file.stem}/{tensor.name}"
                found[key] = (int(entry["offset"]), int(entry["length"]))
            else:
                # Only constants of the graph stay inside it.
                assert tensor.name.startswith("const_")
                assert tensor.ByteSize() < 512
    return found


@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize("plan", WITHOUT_PICTURES)
def test_every_tensor_is_stored_once(
    tmp_path: Path, plan: str, model: str, request: pytest.FixtureRequest
) -> None:
    eager: Eager = request.getfixturevalue(model)
    reports = lowered(tmp_path / "out", eager, PLANS[plan])
    stored = places(tmp_path / "out")
    regions = sorted(set(stored.values()))
    size = (tmp_path / "out" / "graphs" / "weights.bin").stat().st_size

    # No overlap, and gaps no larger than the alignment asks for.
    end = 0
    for offset, length in regions:
        align = PAGE_BYTES if length >= PAGE_BYTES else SMALL_ALIGN_BYTES
        assert offset % align == 0
        assert 0 <= offset - end < align
        end = offset + length
    assert end == size

    # The graphs for many positions store nothing of their own. Of the others, what two names share
    # is the tied embedding and nothing else.
    many = ("prefill/", "prefill_weights/")
    own = {name: place for name, place in stored.items() if not name.startswith(many)}
    assert set(own.values()) == set(regions)
    shared = {p for p in regions if list(own.values()).count(p) > 1}
    names = {n.partition(".weight.")[0] for n, place in own.items() if place in shared}
    assert names == ({"token_embedding/table", "decoder/head"} if model == "tied" else set())

    # The reports tell all bytes, each once.
    told = sum(sum(report.weight_bytes.values()) for report in reports.values())
    assert told == sum(length for _, length in regions)

    # The whole model is there: no tensor of the checkpoint twice, none left out.
    if plan == "fp32":
        tables = 2 * eager.context * eager.spec.text.head_size // 2
        constants = 1 + 2 * 3 * eager.spec.vision.patch_size**2
        elements = sum(int(np.prod(i.shape)) for i in eager.checkpoint.tensors.values())
        assert told == 4 * (elements + tables + constants)


def test_bytes_by_plan(tmp_path: Path, untied: Eager) -> None:
    """Matrices shrink as the scheme says; norms, biases, positions and tables do not."""
    totals = {
        plan: lowered(tmp_path / plan, untied, PLANS[plan])["decoder"].weight_bytes
        for plan in WITHOUT_PICTURES
    }
    matrices = 4 * sum(
        int(np.prod(shape))
        for name, shape in untied.sources["decoder"].shapes.items()
        if len(shape) == 2 and name.endswith(".weight")
    )
    small = totals["fp32"]["float32"] - matrices
    assert totals["fp16"] == {"float16": matrices // 2, "float32": small}
    assert totals["int8"] == {"int8g32h": matrices // 4 + matrices // 64, "float32": small}
    assert totals["int4-fast"] == {"int4g32h": matrices // 8 + matrices // 64, "float32": small}


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", tiny_config())
    for name in ("one", "two"):
        lowered(tmp_path / name, Eager(checkpoint), PLANS["int4-fast"])
    files = sorted(p.name for p in (tmp_path / "one" / "graphs").iterdir())
    graphs = ("decoder", "prefill", "prefill_weights", "token_embedding", "vision_encoder")
    assert files == [*(f"{name}.onnx" for name in graphs), "weights.bin"]
    for file in files:
        one, two = ((tmp_path / n / "graphs" / file).read_bytes() for n in ("one", "two"))
        assert one == two, file
        assert str(tmp_path).encode() not in one


def test_shards_do_not_change_the_bytes(tmp_path: Path, untied: Eager) -> None:
    three_shards = Eager(make_checkpoint(tmp_path / "checkpoint", tiny_config(), shards=3))
    three_shards.programs = untied.programs
    for name, eager in (("one", untied), ("three", three_shards)):
        lowered(tmp_path / name, eager, PLANS["int8"])
    one, three = ((tmp_path / n / "graphs" / "weights.bin").read_bytes() for n in ("one", "three"))
    assert one == three


def test_weight_file_places_and_shares(tmp_path: Path) -> None:
    small, large = np.arange(3, dtype=np.float32), np.ones(PAGE_BYTES, np.uint8)

    def never() -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
        raise AssertionError("made again")

    with WeightFile(tmp_path / "weights.bin") as weights:
        assert not weights.has("a")
        first, written = weights.add("a", "x", (3,), lambda: small)
        assert (first.offset, first.length, written) == (0, 12, 12)
        assert weights.has("a")
        again, written = weights.add("a", "y", (1, 3), never)
        assert (again.offset, again.length, written) == (0, 12, 0)
        assert tuple(again.shape) == (1, 3)
        second, _ = weights.add("b", "z", (3,), lambda: small)
        assert second.offset == SMALL_ALIGN_BYTES
        third, _ = weights.add("c", "w", (PAGE_BYTES,), lambda: large)
        assert third.offset == PAGE_BYTES
        fourth, _ = weights.add("d", "v", (2, 3), lambda: np.ones((3, 2), np.float32).T)
        assert fourth.offset == 2 * PAGE_BYTES
    content = (tmp_path / "weights.bin").read_bytes()
    assert len(content) == 2 * PAGE_BYTES + 24
    assert np.array_equal(np.frombuffer(content[:12], np.float32), small)
    assert set(content[12:SMALL_ALIGN_BYTES]) == {0}


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(64, 8, bias=False), lambda: nn.Embedding(8, 64)]
)
def test_too_large_for_float16(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    embedding = isinstance(make(), nn.Embedding)
    inputs = (
        TensorSpec("x", torch.int64, (1, 2))
        if embedding
        else TensorSpec("x", torch.float32, (1, 64)),
    )
    component = single(make, inputs, (TensorSpec("y", torch.float32, ("a", "b")),))
    weights = weights_of(component)
    weights["weight"][3, 5] = 65520.0  # the smallest that rounds to infinity
    with pytest.raises(ConfigError) as caught:
        lower(tmp_path, component, weights, PLANS["fp16"])
    assert caught.value.exit_code == EXIT_WRONG_INPUT
    for part in ("'weight'", "too large for float16", "decoder", "--quant"):
        assert part in str(caught.value)


def test_check_tells_a_width_that_cannot_be_gathered(tmp_path: Path) -> None:
    config = tiny_config(
        text={"hidden_size": 72, "num_attention_heads": 3, "num_key_value_heads": 3}
    )
    config["text_config"]["head_dim"] = 24
    eager = Eager(make_checkpoint(tmp_path, config))
    matrices = matrices_of(eager.components.values())
    target = find_target("onnx-cpu")
    for plan, wanted in (("fp32", 0), ("fp16", 0), ("int8", 1), ("int4", 1)):
        problems = target.check(matrices, PLANS[plan])
        assert len(problems) == wanted
        assert all("72" in p and "token_embedding/table.weight" in p for p in problems)


def test_unknown_target_lists_the_known() -> None:
    assert "onnx-cpu" in all_targets()
    with pytest.raises(ConfigError) as caught:
        find_target("toaster")
    assert caught.value.exit_code == EXIT_WRONG_INPUT
    assert "'toaster'" in str(caught.value)
    assert "onnx-cpu" in str(caught.value)
