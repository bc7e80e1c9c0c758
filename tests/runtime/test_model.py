"""Opening bundles, damaged ones too, and asking them: settings, threads, and what is imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lorgnette
from lorgnette.bundle import Bundle
from lorgnette.errors import BundleError, ImageError, RequestError
from lorgnette.runtime import model as model_module
from lorgnette.runtime.engines import onnx as onnx_engine
from lorgnette.runtime.engines.engine import WholeEngine
from lorgnette.runtime.generation import Result
from lorgnette.runtime.model import Model, open_model, usable_cores
from tests.runtime.support import (
    FakeEngine,
    copy_bundle,
    edit_json,
    edit_manifest,
    fake_model,
    picture,
    redigest,
)

ROOT = Path(__file__).parents[2]
QUESTION = "What do you see?"


# Opening


def test_open_takes_paths_and_tells_how_long_it_took(fp32: Path) -> None:
    for path in (fp32, str(fp32)):
        model = lorgnette.open(path, threads=1)
        assert model.manifest.recipe.quant == "fp32"
        assert model.bundle.path == fp32
        assert model.load_ms > 0


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_must_be_positive(fp32: Path, threads: int) -> None:
    with pytest.raises(RequestError, match="threads is out of range"):
        open_model(fp32, threads=threads)


def test_no_threads_means_every_usable_core(fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(model_module, "usable_cores", lambda: 3)

    def note(bundle: Bundle, threads: int) -> WholeEngine:
        asked.append(threads)
        return WholeEngine()

    monkeypatch.setattr(model_module, "open_engine", note)
    open_model(fp32)
    open_model(fp32, threads=2)
    assert asked == [3, 2]
    monkeypatch.undo()
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


def test_more_threads_give_the_same_answer(fp32: Path, model: Model) -> None:
    source = picture(50, 90)
    wanted = model.generate(source, QUESTION).result()
    assert open_model(fp32, threads=2).generate(source, QUESTION).result().token_ids == (
        wanted.token_ids
    )


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every graph that is loaded, in order; the decoder takes its time."""
    names: list[str] = []
    load = onnx_engine._session

    def slowly(bundle: Bundle, component: str, threads: int, **options: object) -> object:
        if component == "decoder":
            time.sleep(0.3)
        session = load(bundle, component, threads, **options)  # type: ignore[arg-type]
        names.append(component)
        return session

    monkeypatch.setattr(onnx_engine, "_session", slowly)
    return names


def test_a_model_that_is_not_waited_for_encodes_before_its_decoder_is_there(
    fp32: Path, model: Model, loaded: list[str]
) -> None:
    early = open_model(fp32, threads=1, wait=False)
    edge = model.manifest.spec.vision.image_size
    tiles = np.zeros((1, 3, edge, edge), np.uint8)
    assert early.engine.encode(tiles).shape[0] == 1
    assert "decoder" not in loaded
    wanted = model.generate(picture(50, 90), QUESTION).result()
    assert early.generate(picture(50, 90), QUESTION).result().token_ids == wanted.token_ids
    assert sorted(loaded) == ["decoder", "token_embedding", "vision_encoder"]


def test_what_is_not_waited_for_tells_what_is_wrong_when_it_is_needed(
    fp32: Path, tmp_path: Path
) -> None:
    bundle = copy_bundle(fp32, tmp_path / "b.lorg")
    (bundle / "graphs/decoder.onnx").write_bytes(b"nothing")
    redigest(bundle)
    with pytest.raises(BundleError, match="refuses the graph"):
        open_model(bundle, threads=1)
    early = open_model(bundle, threads=1, wait=False)
    with pytest.raises(BundleError, match=r"refuses the graph in .*decoder.onnx"):
        early.generate((), QUESTION).result()


def test_a_freed_vision_encoder_comes_back_for_the_next_picture(
    fp32: Path, model: Model, loaded: list[str]
) -> None:
    small = open_model(fp32, threads=1, keep_vision=False)
    chat = small.chat()
    for shown in (picture(50, 90), picture(60, 80)):
        wanted = model.generate(shown, QUESTION).result()
        assert small.generate(shown, QUESTION).result().token_ids == wanted.token_ids
    assert loaded.count("vision_encoder") == 2
    # A picture that was seen, and a question without one, need no encoder.
    chat.send(QUESTION, (picture(50, 90),)).result()
    chat.send(QUESTION).result()
    assert loaded.count("vision_encoder") == 2


def flip_byte(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name",
    [
        "graphs/weights.bin",
        "graphs/decoder.onnx",
        "tokenizer/tokenizer.json",
        "golden/golden.json",
        "golden/golden.safetensors",
    ],
)
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_changed_byte_is_found_anywhere(
    fp32: Path, tmp_path: Path, name: str, place: float
) -> None:
    bundle = copy_bundle(fp32, tmp_path / "b.lorg")
    size = (bundle / name).stat().st_size
    flip_byte(bundle / name, int(place * (size - 1)))
    with pytest.raises(BundleError, match=f"'{name}' was changed or damaged"):
        open_model(bundle, threads=1)


@pytest.mark.parametrize("grow", [-1, 1])
def test_another_size_is_found_before_anything_is_read(
    fp32: Path, tmp_path: Path, grow: int
) -> None:
    bundle = copy_bundle(fp32, tmp_path / "b.lorg")
    path = bundle / "graphs/weights.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-1] if grow < 0 else data + b"\0")
    with pytest.raises(BundleError, match="was changed or cut off"):
        open_model(bundle, threads=1)


def test_damage_is_what_is_told_when_the_engine_fails_as_well(
    fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digests are checked while the engine loads, and say better what is wrong."""
    bundle = copy_bundle(fp32, tmp_path / "b.lorg")
    path = bundle / "graphs/decoder.onnx"
    path.write_bytes(b"\xff" * path.stat().st_size)
    # The engine fails at once, the digests come later.
    check = Bundle.check_digests

    def late(bundle: Bundle) -> None:
        time.sleep(0.3)
        check(bundle)

    monkeypatch.setattr(Bundle, "check_digests", late)
    with pytest.raises(BundleError, match="was changed or damaged") as caught:
        open_model(bundle, threads=1)
    assert "refuses the graph" in str(caught.value.__context__)


def test_the_digest_check_outlives_no_failed_opening(
    fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(bundle: Bundle, threads: int) -> None:
        raise BundleError("no engine today")

    monkeypatch.setattr(model_module, "open_engine", fail)
    before = threading.active_count()
    with pytest.raises(BundleError, match="no engine today"):
        open_model(fp32, threads=1)
    assert threading.active_count() == before


def test_weights_behind_a_link_are_refused(fp32: Path, tmp_path: Path) -> None:
    bundle = copy_bundle(fp32, tmp_path / "b.lorg")
    outside = tmp_path / "weights.bin"
    shutil.move(bundle / "graphs/weights.bin", outside)
    (bundle / "graphs/weights.bin").symlink_to(outside)
    with pytest.raises(BundleError, match="goes through a link"):
        open_model(bundle, threads=1)


def other_image_token(bundle: Path) -> None:
    def change(values: dict[str, object]) -> None:
        added = values["added_tokens"]
        assert isinstance(added, list)
        image, end = (
            next(token for token in added if token["content"] == content)
            for content in ("<image>", "<end_of_utterance>")
        )
        image["content"], end["content"] = end["content"], image["content"]

    edit_json(bundle / "tokenizer/tokenizer.json", change)


def no_image_token(bundle: Path) -> None:
    path = bundle / "tokenizer/tokenizer.json"
    path.write_text(path.read_text().replace('"<image>"', '"<picture>"'))


def more_tokens(bundle: Path) -> None:
    def change(values: dict[str, object]) -> None:
        added = values["added_tokens"]
        assert isinstance(added, list)
        added += [
            added[-1] | {"id": added[-1]["id"] + n, "content": f"<n{n}>"} for n in range(1, 99)
        ]

    edit_json(bundle / "tokenizer/tokenizer.json", change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_image_token, "another image token than the manifest"),
        (no_image_token, r"the tokenizer lacks a token in .*: wanted '<image>'"),
        (more_tokens, "more tokens than the model"),
        (lambda bundle: (bundle / "tokenizer/tokenizer.json").write_text("{}"), "is damaged"),
    ],
    ids=["image token", "no image token", "more tokens", "empty"],
)
def test_another_tokenizer_is_refused_even_with_right_digests(
    fp32: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    bundle = copy_bundle(fp32, tmp_path / "b.lorg")
    change(bundle)
    with pytest.raises(BundleError, match=message):
        open_model(redigest(bundle), threads=1)


def test_a_tokenizer_that_is_not_listed_is_refused(fp32: Path, tmp_path: Path) -> None:
    bundle = edit_manifest(
        copy_bundle(fp32, tmp_path / "b.lorg"),
        lambda m: m.update(files=[f for f in m["files"] if "tokenizer" not in f["path"]]),
    )
    with pytest.raises(BundleError, match="is not part of the bundle"):
        open_model(bundle, threads=1)


# Asking


def test_pieces_come_while_the_answer_is_made(fp32: Path) -> None:
    engine = FakeEngine(lambda _: 0)
    model = fake_model(fp32, engine)
    ids = model.tokenizer.encode("abc")
    left = list(ids)
    engine.answer = lambda _: left.pop(0) if left else model.manifest.prompt.stop_token_ids[0]
    seen = []
    for piece in model.generate((), QUESTION):
        seen.append((piece, len(engine.runs)))
    assert seen == [("a", 1), ("b", 2), ("c", 3)]


def test_pictures_come_alone_or_several(model: Model, tmp_path: Path) -> None:
    pixels = picture(20, 30)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    wanted = model.generate([pixels], QUESTION).result()
    alone = (pixels, path, str(path), path.read_bytes(), Image.fromarray(pixels))
    for form in (*alone, (pixels,)):
        result = model.generate(form, QUESTION).result()
        assert result.token_ids == wanted.token_ids
        assert result.image_tokens == wanted.image_tokens > 0
    several = model.generate([pixels, path], QUESTION).result()
    assert several.image_tokens == 2 * wanted.image_tokens
    assert model.generate(prompt=QUESTION).result().image_tokens == 0


def test_nothing_runs_before_the_first_piece(model: Model) -> None:
    generation = model.generate("no such file.png", QUESTION)
    with pytest.raises(ImageError, match="no such file"):
        next(generation)


def test_a_system_message_is_part_of_the_prompt(model: Model) -> None:
    plain = model.generate((), QUESTION).result()
    told = model.generate((), QUESTION, system="Be brief.").result()
    assert told.prompt_tokens > plain.prompt_tokens


def sampled(model: Model, seed: int, **settings: float) -> Result:
    return model.generate(
        (), QUESTION, max_new_tokens=20, temperature=settings.get("temperature", 2.0), seed=seed
    ).result()


def test_the_same_seed_gives_the_same_answer_and_others_do_not(model: Model) -> None:
    first = sampled(model, 7)
    assert sampled(model, 7).token_ids == first.token_ids
    others = {sampled(model, seed).token_ids for seed in range(5)}
    assert len(others) > 1
    # No temperature: the seed does not matter.
    assert len({sampled(model, seed, temperature=0).token_ids for seed in range(3)}) == 1


def test_narrow_sampling_is_greedy(model: Model) -> None:
    greedy = model.generate((), QUESTION, max_new_tokens=20).result().token_ids
    for settings in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}):
        ask = {"temperature": 1.0, "seed": 3, "top_k": 0, "top_p": 1.0} | settings
        result = model.generate(
            (),
            QUESTION,
            max_new_tokens=20,
            temperature=ask["temperature"],
            top_k=int(ask["top_k"]),
            top_p=ask["top_p"],
            seed=int(ask["seed"]),
        ).result()
        assert result.token_ids == greedy


def test_a_repetition_penalty_changes_a_repeating_answer(fp32: Path) -> None:
    engine = FakeEngine(lambda _: 0)
    model = fake_model(fp32, engine)
    a, b = model.tokenizer.encode("ab")
    state = model.engine.new_state()
    run = type(state).run

    def two_favourites(self: object, embeddings: np.ndarray, past: int) -> np.ndarray:
        logits = run(self, embeddings, past)  # type: ignore[arg-type]
        logits[:] = 0
        logits[a], logits[b] = 10, 9
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(state), "run", two_favourites)
        plain = model.generate((), "x", max_new_tokens=4).result().token_ids
        penalised = model.generate((), "x", max_new_tokens=4, repetition_penalty=1.5).result()
    assert plain == (a, a, a, a)
    assert penalised.token_ids == (a, b, a, a)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": 1e9},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"seed": 1 << 64},
        {"max_new_tokens": 0},
        {"stop": ""},
        {"stop": ["a", ""]},
    ],
    ids=str,
)
def test_settings_are_checked_before_anything_runs(
    model: Model, settings: dict[str, object]
) -> None:
    with pytest.raises(RequestError):
        model.generate((), QUESTION, **settings)  # type: ignore[arg-type]


def test_several_threads_ask_one_model_at_once(model: Model) -> None:
    questions = [(picture(40 + i, 70, seed=i), f"How many {i}?") for i in range(4)]

    def ask(i: int) -> tuple[int, ...]:
        source, question = questions[i]
        return model.generate(source, question, max_new_tokens=16).result().token_ids

    wanted = [ask(i) for i in range(4)]
    got: dict[int, tuple[int, ...]] = {}
    barrier = threading.Barrier(4)

    def work(i: int) -> None:
        barrier.wait()
        got[i] = ask(i)

    model.pictures = type(model.pictures)()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i] for i in range(4)] == wanted


def test_timings_say_where_the_time_went(fp32: Path) -> None:
    model = open_model(fp32, threads=1)
    result = model.generate(picture(60, 60), QUESTION, max_new_tokens=4).result()
    timings = result.timings
    phases = (timings.preprocess, timings.vision, timings.prefill)
    assert min(phases) > 0
    assert timings.ttft >= sum(phases)
    if len(result.token_ids) > 1:
        steps = len(result.token_ids) - 1
        assert result.decode_tokens_per_s == pytest.approx(1e3 * steps / timings.decode)


def test_a_slow_reader_costs_no_decode_time(fp32: Path) -> None:
    engine = FakeEngine(lambda _: letter)
    model = fake_model(fp32, engine)
    letter = model.tokenizer.encode("a")[0]
    generation = model.generate((), QUESTION, max_new_tokens=5)
    for _ in generation:
        time.sleep(0.05)
    assert generation.result().timings.decode < 100


# What is imported


WITHOUT_EXPORT = """
import sys
import lorgnette
assert not [name for name in sys.modules if name.startswith("lorgnette.")], "import is not cheap"
assert "numpy" not in sys.modules

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "jinja2", "onnx", "onnx_ir"}:
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, Refuse())
from lorgnette.runtime.verify import verify
model = lorgnette.open(sys.argv[1], threads=1)
verify(model).require("here")
chat = model.chat()
result = chat.send("What do you see?", [sys.argv[2]]).result()
chat.send("Where?").result()
bare = {"export", "quantize", "targets", "runtime"} & set(sys.modules)
halves = [n for n in sys.modules if n.startswith(("lorgnette.export", "lorgnette.quantize"))]
assert not bare and not halves, (bare, halves)
import json
print(json.dumps(result.token_ids))
"""


def test_running_a_bundle_imports_nothing_of_the_export(
    fp32: Path, model: Model, tmp_path: Path
) -> None:
    source = tmp_path / "picture.png"
    Image.fromarray(picture(50, 90)).save(source)
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXPORT, str(fp32), str(source)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    wanted = model.generate(source, QUESTION).result().token_ids
    assert json.loads(ran.stdout) == list(wanted)
