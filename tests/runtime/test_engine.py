"""onnxruntime behind the engine's protocol: a cache in place, and graphs that are what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorgnette.bundle import open_bundle
from lorgnette.errors import BundleError
from lorgnette.runtime.engines import onnx as engine_module
from lorgnette.runtime.engines import open_engine
from lorgnette.runtime.engines.onnx import OnnxEngine
from lorgnette.runtime.model import Model, open_model
from tests.runtime.support import (
    Json,
    copy_bundle,
    edit_manifest,
    picture,
    redigest,
    run,
    some_ids,
    state_of,
)

ROOT = Path(__file__).parents[2]
SENTINEL = np.float32(12345)


# The cache


def test_inputs_and_outputs_of_the_cache_are_one_memory(model: Model) -> None:
    state = state_of(model)
    run(model, state, some_ids(model, 9), 0)
    outputs = state._bindings["decoder"].get_outputs()
    held = [cache.ctypes.data for cache in state._caches]
    assert [value.data_ptr() for value in outputs] == [state._logits.ctypes.data, *held]
    layers = model.manifest.spec.text.layers
    assert len(set(held)) == 2 * layers


def test_a_run_writes_its_positions_and_no_others(model: Model) -> None:
    state = state_of(model)
    run(model, state, some_ids(model, 1), 0)
    addresses = [cache.ctypes.data for cache in state._caches]
    for cache in state._caches:
        cache[:] = SENTINEL
    for past, count in ((0, 9), (9, 1), (10, 1), (11, 30)):
        run(model, state, some_ids(model, count, past), past)
        for cache in state._caches:
            assert np.all(cache[:, :, past + count :] == SENTINEL)
            assert not np.any(cache[:, :, : past + count] == SENTINEL)
    assert [cache.ctypes.data for cache in state._caches] == addresses


def test_decoding_leaves_what_was_there_bit_for_bit(model: Model) -> None:
    state = state_of(model)
    run(model, state, some_ids(model, 20), 0)
    before = [cache[:, :, :20].copy() for cache in state._caches]
    for past in range(20, 24):
        run(model, state, some_ids(model, 1, past), past)
    for cache, kept in zip(state._caches, before, strict=True):
        np.testing.assert_array_equal(cache[:, :, :20], kept)


def test_a_cache_that_grows_keeps_what_it_held(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = some_ids(model, 40)
    whole = run(model, state_of(model), ids, 0)
    monkeypatch.setattr(engine_module, "FIRST_POSITIONS", 4)
    state = state_of(model)
    sizes = []
    for past, count in ((0, 3), (3, 1), (4, 1), (5, 12), (17, 23)):
        logits = run(model, state, ids[past : past + count], past)
        sizes.append(state._caches[0].shape[2])
    assert sizes == [4, 4, 8, 32, 64]
    np.testing.assert_allclose(logits, whole, rtol=1e-4, atol=1e-5)
    held = [cache.ctypes.data for cache in state._caches]
    outputs = [value.data_ptr() for value in state._bindings["decoder"].get_outputs()]
    assert sorted(outputs) == sorted([*held, state._logits.ctypes.data])


def test_a_cache_never_outgrows_the_context(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "FIRST_POSITIONS", 3)
    state = state_of(model)
    state.capacity = 10
    run(model, state, some_ids(model, 9), 0)
    assert state._caches[0].shape[2] == 10


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 39), max_size=5, unique=True).map(sorted))
def test_any_way_to_cut_a_prompt_gives_the_same_logits(model: Model, cuts: list[int]) -> None:
    ids = some_ids(model, 40)
    whole = run(model, state_of(model), ids, 0)
    state = state_of(model)
    for start, end in zip([0, *cuts], [*cuts, 40], strict=True):
        logits = run(model, state, ids[start:end], start)
    np.testing.assert_allclose(logits, whole, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("back", [0, 1, 7, 29])
def test_a_cache_that_was_cut_back_is_as_good_as_new(model: Model, back: int) -> None:
    first, second = some_ids(model, 30), some_ids(model, 12, seed=1)
    state = state_of(model)
    run(model, state, first, 0)
    again = run(model, state, second, back)
    fresh = run(model, state_of(model), np.concatenate([first[:back], second]), 0)
    np.testing.assert_allclose(again, fresh, rtol=1e-3, atol=2e-4)
    # And one step further, which reads what both wrote.
    step = some_ids(model, 1, seed=2)
    behind = run(model, state, step, back + 12)
    other = state_of(model)
    run(model, other, np.concatenate([first[:back], second]), 0)
    np.testing.assert_allclose(behind, run(model, other, step, back + 12), rtol=1e-3, atol=2e-4)


def test_positions_count(model: Model) -> None:
    """The same tokens behind another past are another question: rotary positions are applied."""
    ids = some_ids(model, 8)
    state = state_of(model)
    first = run(model, state, ids, 0)
    second = run(model, state, ids, 8)
    assert np.abs(first - second).max() > 1e-2


def test_states_of_one_engine_know_nothing_of_each_other(model: Model) -> None:
    ids, other = some_ids(model, 12), some_ids(model, 12, seed=1)
    one, two = state_of(model), state_of(model)
    first = run(model, one, ids[:11], 0)
    run(model, two, other, 0)
    np.testing.assert_array_equal(first, run(model, state_of(model), ids[:11], 0))
    alone = state_of(model)
    run(model, alone, ids[:11], 0)
    np.testing.assert_array_equal(run(model, one, ids[11:], 11), run(model, alone, ids[11:], 11))


def test_the_last_position_can_be_used_and_no_further(model: Model) -> None:
    state = state_of(model)
    step = some_ids(model, 1)
    assert np.isfinite(run(model, state, step, state.capacity - 1)).all()
    with pytest.raises(ValueError, match="positions in"):
        run(model, state, step, state.capacity)


def test_embeddings_need_not_be_contiguous(model: Model) -> None:
    embeddings = model.engine.embed(some_ids(model, 10))
    wanted = state_of(model).run(embeddings, 0).copy()
    strided = np.zeros((10, 2 * embeddings.shape[1]), np.float32)[:, ::2]
    strided[:] = embeddings
    np.testing.assert_array_equal(state_of(model).run(strided, 0), wanted)


# What is not as it should be


def test_an_unknown_engine_is_named(fp32: Path, tmp_path: Path) -> None:
    bundle = edit_manifest(
        copy_bundle(fp32, tmp_path / "b.lorg"), lambda m: m.update(engine="abacus")
    )
    with pytest.raises(BundleError, match=r"unknown engine .*: got 'abacus', wanted onnxruntime"):
        open_engine(open_bundle(bundle), 1)


def component(manifest: Json, name: str) -> Json:
    found: Json = next(entry for entry in manifest["components"] if entry["name"] == name)
    return found


def make_square(manifest: Json, **changes: object) -> None:
    """Preprocessing of the square kind, made of the other one's numbers."""
    tiles = manifest["preprocess"]
    kept = {key: tiles[key] for key in ("tile_size", "resample", "rescale", "mean", "std")}
    square = {"kind": "square", "fit": "pad", "background": [0, 0, 0]}
    manifest.update(preprocess=kept | square | changes, requires=["square"])


def make_huge(manifest: Json) -> None:
    """Tiles of a million pixels each way, and image tokens to match."""
    side = 1_000_000
    manifest["preprocess"]["tile_size"] = manifest["spec"]["vision"]["image_size"] = side
    grid = manifest["spec"]["vision"]["patch_size"]
    fold = manifest["spec"]["projector"]["patches_per_token"]
    manifest["prompt"]["image"]["tokens_per_tile"] = (side // grid) ** 2 // fold


def make_huge_square(manifest: Json) -> None:
    make_square(manifest)
    make_huge(manifest)


LIES: dict[str, Callable[[Json], None]] = {
    "tile edge": lambda m: component(m, "vision_encoder")["inputs"][0].update(
        shape=["G", 3, 32, 32]
    ),
    "tile dtype": lambda m: component(m, "vision_encoder")["inputs"][0].update(dtype="float32"),
    "tile name": lambda m: component(m, "vision_encoder")["inputs"][0].update(name="pixels"),
    "image token width": lambda m: component(m, "vision_encoder")["outputs"][0].update(
        shape=["G", 16, 8]
    ),
    "fixed length": lambda m: component(m, "token_embedding")["inputs"][0].update(shape=[1, 1]),
    "no logits": lambda m: component(m, "decoder").update(outputs=[]),
    "logits width": lambda m: component(m, "decoder")["outputs"][0].update(shape=[1, 7]),
    "cache shape": lambda m: component(m, "decoder")["cache_inputs"][0].update(
        shape=[1, 1, "S", 32]
    ),
    "cache dtype": lambda m: component(m, "decoder")["cache_outputs"][3].update(dtype="float16"),
    "a cache less": lambda m: component(m, "decoder")["cache_outputs"].pop(),
    "no component": lambda m: m["components"].pop(0),
    "no layers": lambda m: m["spec"]["text"].update(layers=0),
    "patch size": lambda m: m["spec"]["vision"].update(patch_size=0),
    "patches of an image token": lambda m: m["spec"]["projector"].update(patches_per_token=0),
    "width": lambda m: m["spec"]["text"].update(hidden_size=64),
    "vocabulary": lambda m: m["spec"]["text"].update(vocab_size=99999),
    "heads": lambda m: m["spec"]["text"].update(kv_heads=1),
    "context beyond the model's": lambda m: m.update(context_length=1 << 40),
    "no context": lambda m: m.update(context_length=1),
    "tile size": lambda m: m["preprocess"].update(tile_size=128),
    "a tile too large": make_huge,
    "longest edge": lambda m: m["preprocess"].update(longest_edge=0),
    "rescale": lambda m: m["preprocess"].update(rescale=0.0),
    "negative std": lambda m: m["preprocess"].update(std=[0.5, -0.5, 0.5]),
    "std of nothing": lambda m: m["preprocess"].update(std=[0.5, 0.5, 0.0]),
    "endless mean": lambda m: m["preprocess"].update(mean=[1e300, 0.5, 0.5]),
    "colour above 255": lambda m: make_square(m, background=[0, 256, 0]),
    "colour below 0": lambda m: make_square(m, background=[-1, 0, 0]),
    "tile size of a square": lambda m: make_square(m, tile_size=0),
    "a square too large": make_huge_square,
    "tokens a tile": lambda m: m["prompt"]["image"].update(tokens_per_tile=15),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies_is_refused_at_opening(fp32: Path, tmp_path: Path, lie: str) -> None:
    bundle = edit_manifest(copy_bundle(fp32, tmp_path / "b.lorg"), LIES[lie])
    with pytest.raises(BundleError, match=r"does not fit together|component .* is missing"):
        open_model(bundle, threads=1)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
@pytest.mark.parametrize("field", ["rescale", "std", "mean"])
def test_numbers_that_are_none_are_refused_at_opening(
    fp32: Path, tmp_path: Path, field: str, number: str
) -> None:
    bundle = copy_bundle(fp32, tmp_path / "b.lorg")
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["preprocess"][field] = "X" if field == "rescale" else ["X", 0.5, 0.5]
    path.write_text(json.dumps(manifest).replace('"X"', number))
    with pytest.raises(BundleError, match="manifest is not valid"):
        open_model(bundle, threads=1)


def test_square_preprocessing_opens(fp32: Path, tmp_path: Path) -> None:
    bundle = edit_manifest(copy_bundle(fp32, tmp_path / "b.lorg"), make_square)
    answer = open_model(bundle, threads=1).generate(picture(30, 50), "What?", max_new_tokens=2)
    assert answer.result().tiles == 1


def consistent_lies(manifest: Json) -> None:
    """Another width everywhere in the manifest; only the graphs know better."""
    text = json.dumps(manifest)
    width = manifest["spec"]["text"]["hidden_size"]
    changed = json.loads(text.replace(f", {width}]", f", {width + 8}]"))
    changed["spec"]["text"]["hidden_size"] = width + 8
    manifest.update(changed)


def test_a_manifest_that_agrees_only_with_itself_is_refused(fp32: Path, tmp_path: Path) -> None:
    bundle = edit_manifest(copy_bundle(fp32, tmp_path / "b.lorg"), consistent_lies)
    with pytest.raises(BundleError, match="graph is not what the manifest says"):
        open_model(bundle, threads=1)


def swap_graphs(bundle: Path) -> None:
    graphs = bundle / "graphs"
    held = (graphs / "decoder.onnx").read_bytes()
    (graphs / "decoder.onnx").write_bytes((graphs / "vision_encoder.onnx").read_bytes())
    (graphs / "vision_encoder.onnx").write_bytes(held)


def edit_graph(bundle: Path, name: str, change: Callable[[onnx.ModelProto], None]) -> None:
    path = bundle / "graphs" / f"{name}.onnx"
    graph = onnx.load(path, load_external_data=False)
    change(graph)
    path.write_bytes(graph.SerializeToString())


def unknown_operator(graph: onnx.ModelProto) -> None:
    graph.graph.node[-1].op_type = "Daydream"


def outside_weights(graph: onnx.ModelProto) -> None:
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../../../etc/passwd"


def beyond_weights(graph: onnx.ModelProto) -> None:
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "offset":
                entry.value = str(1 << 40)


def garbage(bundle: Path) -> None:
    (bundle / "graphs/decoder.onnx").write_bytes(b"\x00garbage")


def empty(bundle: Path) -> None:
    (bundle / "graphs/vision_encoder.onnx").write_bytes(b"")


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "swapped": (swap_graphs, "graph is not what the manifest says"),
    "garbage": (garbage, "refuses the graph"),
    "empty": (empty, "refuses the graph"),
    "operator": (lambda bundle: edit_graph(bundle, "decoder", unknown_operator), "refuses"),
    "outside": (lambda bundle: edit_graph(bundle, "decoder", outside_weights), "refuses"),
    "beyond": (lambda bundle: edit_graph(bundle, "decoder", beyond_weights), "refuses"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_graphs_are_refused_even_with_right_digests(
    fp32: Path, tmp_path: Path, how: str
) -> None:
    bundle = copy_bundle(fp32, tmp_path / "b.lorg")
    change, message = BROKEN[how]
    change(bundle)
    with pytest.raises(BundleError, match=message):
        open_model(redigest(bundle), threads=1)


def test_what_the_engine_refuses_while_it_runs_is_a_bundle_error(
    fp32: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The rotary table ends where the exported context did."""

    def longer(manifest: Json) -> None:
        manifest["context_length"] *= 4
        manifest["spec"]["text"]["max_positions"] *= 4

    bundle = edit_manifest(copy_bundle(fp32, tmp_path / "b.lorg"), longer)
    model = open_model(bundle, threads=1)
    with pytest.raises(BundleError, match=r"onnxruntime .* failed in decoder: got .*cos_cache"):
        model.generate((), "hello there " * 400, max_new_tokens=2).result()
    assert capfd.readouterr().err == "", "the error was printed as well as raised"


def test_ids_outside_the_vocabulary_are_refused(model: Model) -> None:
    with pytest.raises(BundleError, match="failed in token_embedding"):
        model.engine.embed(np.array([model.manifest.spec.text.vocab_size]))


# onnxruntime itself


def test_telemetry_is_off_before_onnxruntime_is_loaded() -> None:
    program = (
        "import os, sys\n"
        "import lorgnette.runtime.model\n"
        "assert 'onnxruntime' not in sys.modules\n"
        "import lorgnette.runtime.engines.onnx\n"
        "print(os.environ['ORT_DISABLE_TELEMETRY'])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    printed = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout == "1\n"


def test_the_engine_is_onnxruntime(model: Model) -> None:
    assert isinstance(model.engine, OnnxEngine)


ON_THE_FLOOR = """
import json, sys
import onnxruntime
import lorgnette
from lorgnette.runtime.verify import verify

model = lorgnette.open(sys.argv[1], threads=1)
ladder = verify(model)
greedy = model.generate(sys.argv[2], "What do you see?", max_new_tokens=24).result()
print(json.dumps({
    "version": onnxruntime.__version__,
    "rungs": [[rung.name, rung.passed, rung.detail] for rung in ladder.rungs],
    "ids": greedy.token_ids,
}))
"""


@pytest.mark.parametrize("scheme", ["fp32", "int4"])
def test_the_oldest_engine_gives_the_same_answer(
    bundle_of: Callable[[str], Path], ort_floor_path: Path, tmp_path: Path, scheme: str
) -> None:
    from PIL import Image

    source = tmp_path / "picture.png"
    Image.fromarray(picture(50, 90, seed=2)).save(source)
    bundle = bundle_of(scheme)
    ran = subprocess.run(
        [sys.executable, "-c", ON_THE_FLOOR, str(bundle), str(source)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ort_floor_path), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert told["version"] == "1.24.2"
    assert all(passed for _, passed, _ in told["rungs"]), told["rungs"]
    assert [name for name, _, _ in told["rungs"]][-1] == "greedy_ids"
    here = open_model(bundle, threads=1)
    wanted = here.generate(source, "What do you see?", max_new_tokens=24).result()
    assert told["ids"] == list(wanted.token_ids)
