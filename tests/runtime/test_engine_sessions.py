"""Sessions of onnxruntime: when threads rest, what memory returns, which graph runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from lorgnette.bundle import Bundle
from lorgnette.errors import BundleError
from lorgnette.runtime.engines import onnx as engine_module
from lorgnette.runtime.engines.onnx import OnnxEngine
from lorgnette.runtime.model import Model, open_model
from tests.runtime.support import copy_bundle, redigest, run, some_ids, state_of


def test_threads_of_long_runs_stop_spinning_and_those_of_decoding_do_not(
    bundle_of: Callable[[str], Path],
) -> None:
    engine = open_model(bundle_of("int4-fast"), threads=1).engine
    assert isinstance(engine, OnnxEngine)
    engine.expect(10_000)
    told = {
        name: engine._session(name)
        .get_session_options()
        .get_session_config_entry("session.force_spinning_stop")
        for name in ("vision_encoder", "prefill")
    }
    assert set(told.values()) == {"1"}
    options = engine._session("decoder").get_session_options()
    with pytest.raises(RuntimeError, match="force_spinning_stop"):
        options.get_session_config_entry("session.force_spinning_stop")


def test_working_memory_is_given_back_behind_the_last_tile(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []
    make = engine_module._giving_memory_back

    def noted() -> onnxruntime.RunOptions:
        options = make()
        given.append(options.get_run_config_entry("memory.enable_memory_arena_shrinkage"))
        return options

    monkeypatch.setattr(engine_module, "_giving_memory_back", noted)
    edge = model.manifest.spec.vision.image_size
    tiles = np.zeros((1, 3, edge, edge), np.uint8)
    kept = model.engine.encode(tiles, more=True)
    assert given == []
    np.testing.assert_array_equal(model.engine.encode(tiles), kept)
    assert given == ["cpu:0"]


def test_many_positions_take_the_graph_that_is_there_for_them(
    bundle_of: Callable[[str], Path],
) -> None:
    """Both graphs give nearly the same logits and leave nearly the same cache.

    Nearly: they round other things, and the questions are noise. Logits of unrelated weights would
    differ by about 1.4 of their length.
    """
    model = open_model(bundle_of("int4-fast"), threads=1)
    function = next(iter(model.manifest.component("decoder").functions))
    count = function.positions
    if model.manifest.context_length <= count:
        pytest.fail("the context of the bundle is too short for this test")
    ids = some_ids(model, count)
    few, many = state_of(model), state_of(model)
    for start in range(0, count, count // 2):
        split = run(model, few, ids[start : start + count // 2], start)
    whole = run(model, many, ids, 0)
    assert (set(few._bindings), set(many._bindings)) == ({"decoder"}, {"prefill"})
    step = [run(model, state, some_ids(model, 1, 3), count) for state in (few, many)]
    for one, other in ((split, whole), step):
        assert 0 < np.linalg.norm(one - other) / np.linalg.norm(one) < 0.25


def test_weights_for_many_positions_are_made_once_and_only_when_needed(
    bundle_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    make = engine_module._made_weights

    def noted(bundle: Bundle, threads: int) -> dict[str, np.ndarray]:
        arrays = make(bundle, threads)
        made.append(sum(array.nbytes for array in arrays.values()))
        return arrays

    monkeypatch.setattr(engine_module, "_made_weights", noted)
    model = open_model(bundle_of("int4-fast"), threads=1)
    count = model.manifest.component("decoder").functions[0].positions
    run(model, state_of(model), some_ids(model, count - 1), 0)
    assert made == []
    results = [run(model, state_of(model), some_ids(model, count), 0) for _ in range(2)]
    np.testing.assert_array_equal(*results)
    codes = model.manifest.component("decoder").weight_bytes["int4g32h"]
    # Twice the codes without their scales, and less the head's.
    assert len(made) == 1
    assert codes < made[0] < 2 * codes


def test_without_those_weights_prompts_of_any_length_take_one_graph(
    bundle_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(bundle: Bundle, threads: int) -> dict[str, np.ndarray]:
        raise AssertionError("weights were made")

    monkeypatch.setattr(engine_module, "_made_weights", refused)
    model = open_model(bundle_of("int4-fast"), threads=1, prefill_weights=False)
    ids = some_ids(model, model.manifest.component("decoder").functions[0].positions)
    model.engine.expect(len(ids))
    state = state_of(model)
    run(model, state, ids, 0)
    assert set(state._bindings) == {"decoder"}
    assert model.engine.new_prefill_state() is None


def test_a_graph_of_weights_that_makes_too_much_is_refused(
    bundle_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its arrays are allocated by what it says of itself."""
    broken = copy_bundle(bundle_of("int4-fast"), tmp_path / "broken.lorg")
    size = 1 << 16
    nodes = [
        onnx.helper.make_node("Cast", ["first_row"], ["zero"], to=onnx.TensorProto.INT8),
        onnx.helper.make_node("Expand", ["zero", "shape"], ["codes"]),
    ]
    scalar = onnx.helper.make_tensor_value_info("first_row", onnx.TensorProto.INT64, [])
    codes = onnx.helper.make_tensor_value_info("codes", onnx.TensorProto.INT8, [size, size])
    shape = onnx.numpy_helper.from_array(np.array([size, size]), "shape")
    made = onnx.helper.make_graph(nodes, "weights", [scalar], [codes], [shape])
    opsets = [onnx.helper.make_opsetid("", 21)]
    model_made = onnx.helper.make_model(made, opset_imports=opsets, ir_version=10)
    onnx.save(model_made, broken / "graphs" / "prefill_weights.onnx")
    redigest(broken)
    model = open_model(broken, threads=1)
    count = model.manifest.component("decoder").functions[0].positions
    with pytest.raises(BundleError, match=r"makes too much in .*prefill_weights.onnx"):
        run(model, state_of(model), some_ids(model, count), 0)


@pytest.mark.parametrize("change", ["renamed", "missing"])
def test_weights_that_do_not_fit_the_prefill_graph_are_refused(
    bundle_of: Callable[[str], Path], tmp_path: Path, change: str
) -> None:
    broken = copy_bundle(bundle_of("int4-fast"), tmp_path / "broken.lorg")
    graph = broken / "graphs" / "prefill_weights.onnx"
    loaded = onnx.load(graph, load_external_data=False)
    output = loaded.graph.output[0]
    if change == "missing":
        loaded.graph.output.remove(output)
    else:
        for node in loaded.graph.node:
            for index, name in enumerate(node.output):
                if name == output.name:
                    node.output[index] = "other"
        output.name = "other"
    onnx.save(loaded, graph)
    redigest(broken)
    model = open_model(broken, threads=1)
    count = model.manifest.component("decoder").functions[0].positions
    state = state_of(model)
    for _ in range(2):
        with pytest.raises(BundleError, match=r"onnxruntime .* failed"):
            run(model, state, some_ids(model, count), 0)
