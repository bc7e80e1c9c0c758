"""Sessions of onnxruntime: when threads rest, what memory returns, which graph runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from lorgnette.runtime.engines import onnx as engine_module
from lorgnette.runtime.engines.onnx import OnnxEngine
from lorgnette.runtime.model import Model, open_model
from tests.runtime.support import run, some_ids, state_of


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
