"""Bundles with a task, a system message of their own and a header before every answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lorgnette.errors import BundleError, RequestError
from lorgnette.runtime.generation import Request
from lorgnette.runtime.model import Model, open_model
from lorgnette.runtime.prompt import ImagePart, Message, TaskPart
from tests.runtime.support import (
    PICTURE_ID,
    FakeEngine,
    Json,
    copy_bundle,
    edit_manifest,
    fake_model,
    held,
    picture,
    prompt_ids,
    script,
    user,
)

QUESTION = "What is it?"
HEADER = "<|im_start|>assistant"
OWN = "You are brief."
OCR = " <|im_start|>read {image}"


def make_omni(manifest: Json) -> None:
    """OmniVLM's preprocessing and prompt on another model's numbers."""
    tiles = manifest["preprocess"]
    kept = {key: tiles[key] for key in ("tile_size", "resample", "rescale", "mean", "std")}
    manifest["preprocess"] = {"kind": "square", "fit": "stretch", "background": [0, 0, 0]} | kept
    manifest["requires"] = ["square"]
    prompt = manifest["prompt"]
    prompt["prefix"] = prompt["generation"] = ""
    for role, footer in (("system", "<|im_end|>\n"), ("user", "<|im_end|>"), ("assistant", "\n")):
        header = f"<|im_start|>{role}\n"
        turn = {"header": header, "header_image_first": header, "footer": footer}
        prompt["turns"][role] = turn
    prompt["turns"]["assistant"]["footer"] = "<|im_end|>\n"
    prompt["image"] |= {"single": "\n{image}", "tile": "", "row_end": "", "thumbnail": ""}
    prompt["default_system"], prompt["answer_header"] = OWN, HEADER
    prompt["tasks"] = {"ocr": OCR}


@pytest.fixture(scope="module")
def omni(fp32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return edit_manifest(
        copy_bundle(fp32, tmp_path_factory.mktemp("omni") / "omni.lorg"), make_omni
    )


@pytest.fixture(scope="module")
def end(model: Model) -> int:
    return model.tokenizer.token_id("<|im_end|>")


@pytest.fixture
def faked_omni(omni: Path, tmp_path: Path, end: int) -> tuple[Model, FakeEngine]:
    """The model behind an engine that answers what a test wants, and stops at `<|im_end|>`."""
    bundle = edit_manifest(
        copy_bundle(omni, tmp_path / "b.lorg"), lambda m: m["prompt"].update(stop_token_ids=[end])
    )
    engine = FakeEngine(lambda _: end)
    return fake_model(bundle, engine), engine


# Tasks


def test_a_task_is_asked_about_one_picture(faked_omni: tuple[Model, FakeEngine]) -> None:
    model, engine = faked_omni
    chat = model.chat()
    result = chat.send("", [picture(30, 90)], task="ocr").result()
    ids = prompt_ids(model, Message("user", (TaskPart("ocr"),)))
    image = model.manifest.spec.image_token_id
    got = held(chat)
    assert len(got) == len(ids) == result.prompt_tokens
    assert [g for g, i in zip(got, ids, strict=True) if i != image] == [
        i for i in ids if i != image
    ]
    pictured = [g for g, i in zip(got, ids, strict=True) if i == image]
    assert len(pictured) == result.image_tokens == model.manifest.prompt.image.tokens_per_tile
    assert all(token <= PICTURE_ID for token in pictured)
    assert (result.tiles, engine.tiles) == (1, [1])
    text = model.tokenizer.decode(ids, skip_special=False)
    assert "<|im_start|>user\n <|im_start|>read <image>" in text
    assert text.endswith("<image><|im_end|>")
    assert model.generate(picture(30, 90), task="ocr").result().prompt_tokens == len(ids)


def test_a_task_goes_with_questions_in_one_chat(faked_omni: tuple[Model, FakeEngine]) -> None:
    model, _ = faked_omni
    chat = model.chat()
    chat.send("Hm", [picture(9, 9)]).result()
    second = chat.send(images=[picture(9, 9, seed=1)], task="ocr").result()
    chat.send("And?").result()
    assert second.image_tokens == 2 * model.manifest.prompt.image.tokens_per_tile
    pictured = [i for i in held(chat) if i <= PICTURE_ID]
    assert len(pictured) == second.image_tokens
    assert len(set(pictured)) == len(pictured)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda chat: chat.send("Read", [picture(9, 9)], task="ocr"), "takes no prompt.*'Read'"),
        (lambda chat: chat.send("", [], task="ocr"), "one picture in ocr: got 0 pictures"),
        (lambda chat: chat.send("", [picture(9, 9)] * 2, task="ocr"), "got 2 pictures"),
        (lambda chat: chat.send("", [picture(9, 9)], task="find"), "got 'find', wanted ocr"),
        (lambda chat: chat.send("", [picture(9, 9)], task=""), "no such task: got ''"),
    ],
)
def test_what_does_not_go_with_a_task_is_refused_at_once(
    faked_omni: tuple[Model, FakeEngine], ask: Callable[..., object], message: str
) -> None:
    model, engine = faked_omni
    chat = model.chat()
    with pytest.raises(RequestError, match=message):
        ask(chat)
    assert not engine.tiles
    assert chat.send("Hm").result().finish_reason == "stop", "the chat is free"


def test_a_model_without_tasks_says_so(faked: tuple[Model, FakeEngine]) -> None:
    with pytest.raises(RequestError, match="the model has no tasks: got 'ocr'"):
        faked[0].generate(picture(9, 9), task="ocr")


# The system message


def test_the_own_system_message_stands_once(faked_omni: tuple[Model, FakeEngine]) -> None:
    model, _ = faked_omni
    chat = model.chat()
    chat.send("Hm").result()
    chat.send("And?").result()
    text = model.tokenizer.decode(held(chat), skip_special=False)
    assert text.startswith(f"<|im_start|>system\n{OWN}<|im_end|>\n<|im_start|>user\nHm<|im_end|>")
    assert text.count("system") == 1
    other = model.chat("Be long.")
    other.send("Hm").result()
    assert OWN not in model.tokenizer.decode(held(other))


# The header of an answer


def test_the_header_is_in_the_context_and_not_in_the_text(
    faked_omni: tuple[Model, FakeEngine], end: int
) -> None:
    model, engine = faked_omni
    answer = model.tokenizer.encode(f"\n{HEADER}\nA red dot.")
    engine.answer = script(answer, end)
    chat = model.chat()
    generation = chat.send(QUESTION)
    pieces = list(generation)
    first = generation.result()
    assert "".join(pieces) == first.text == "A red dot."
    assert all(pieces)
    assert first.token_ids == (*answer, end)
    engine.answer = script([], end)
    second = chat.send("Where?").result()
    system = f"<|im_start|>system\n{OWN}<|im_end|>\n"
    assert model.tokenizer.decode(held(chat), skip_special=False) == (
        f"{system}<|im_start|>user\n{QUESTION}<|im_end|>\n{HEADER}\nA red dot.<|im_end|>\n"
        "<|im_start|>user\nWhere?<|im_end|>"
    )
    assert held(chat)[: first.prompt_tokens + len(answer)] == [
        *prompt_ids(model, user(QUESTION)),
        *answer,
    ]
    assert second.prefilled_tokens == second.prompt_tokens - first.prompt_tokens - len(answer)


@pytest.mark.parametrize("limit", range(1, 9))
def test_an_answer_cut_by_its_length_in_the_header_is_empty(
    faked_omni: tuple[Model, FakeEngine], end: int, limit: int
) -> None:
    model, engine = faked_omni
    header = model.tokenizer.encode(f"\n{HEADER}\n")
    engine.answer = script([*header, *model.tokenizer.encode("Red")], end)
    result = model.generate((), QUESTION, max_new_tokens=limit).result()
    assert len(result.token_ids) == limit
    assert result.finish_reason == "length"
    assert (result.text == "") == (limit <= len(header))


def test_the_stop_token_in_the_header_ends_the_answer(
    faked_omni: tuple[Model, FakeEngine], end: int
) -> None:
    model, engine = faked_omni
    engine.answer = script(model.tokenizer.encode(f"\n{HEADER}")[:3], end)
    result = model.generate((), QUESTION).result()
    assert (result.text, result.finish_reason) == ("", "stop")


def test_stop_strings_are_not_looked_for_in_the_header(
    faked_omni: tuple[Model, FakeEngine], end: int
) -> None:
    model, engine = faked_omni
    answer = model.tokenizer.encode(f"\n{HEADER}\nThe assistant\nsees")
    for stop, text, reason in (
        ("assistant", "The ", "stop_string"),
        ("\nT", "The assistant\nsees", "stop"),
        ("t\nT", "The assistant\nsees", "stop"),
        ("Ts", "The assistant\nsees", "stop"),
    ):
        engine.answer = script(answer, end)
        result = model.generate((), QUESTION, stop=stop).result()
        assert (result.text, result.finish_reason) == (text, reason)


def test_what_only_begins_as_a_header_is_text_with_stop_strings(
    faked_omni: tuple[Model, FakeEngine], end: int
) -> None:
    model, engine = faked_omni
    start = model.tokenizer.encode(f"\n{HEADER}")
    engine.answer = script([*start[:-1], *model.tokenizer.encode("!")], end)
    text = model.tokenizer.decode(start[:-1])
    assert model.generate((), QUESTION).result().text == f"{text}!"
    engine.answer = script([*start[:-1], *model.tokenizer.encode("!")], end)
    assert model.generate((), QUESTION, stop="!").result().text == text


def test_a_cancelled_header_is_continued(faked_omni: tuple[Model, FakeEngine], end: int) -> None:
    model, engine = faked_omni
    start = model.tokenizer.encode(f"\n{HEADER}\n")
    engine.answer = script(start, end)
    chat = model.chat()
    first = chat.send(QUESTION, (), Request(max_new_tokens=2)).result()
    engine.answer = script([], end)
    chat.send("Where?").result()
    assert held(chat)[first.prompt_tokens : first.prompt_tokens + 3] == [*start[:2], end]


def test_the_real_engine_answers_with_such_a_prompt(omni: Path) -> None:
    model = open_model(omni, threads=1)
    result = model.generate(picture(40, 90), task="ocr", max_new_tokens=4).result()
    assert result.tiles == 1
    assert result.image_tokens == model.manifest.prompt.image.tokens_per_tile


# Room in the context


def test_a_prompt_that_does_not_fit_is_refused_before_its_pictures_are_encoded(
    fp32: Path, stop: int
) -> None:
    engine = FakeEngine(lambda _: stop, capacity=200)
    model = fake_model(fp32, engine)
    for prompt, count in (("Hm " * 150, 1), ("Hm", 40)):
        with pytest.raises(RequestError, match="the prompt does not fit the context"):
            model.chat().send(prompt, [picture(9, 9, seed=n) for n in range(count)]).result()
        with pytest.raises(RequestError, match="special token"):
            model.chat().send("<image>", [picture(9, 9)]).result()
    assert engine.tiles == []


def test_pictures_beyond_the_context_are_not_even_resized(
    fp32: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resized(*_: object) -> None:
        pytest.fail("a picture was resized")

    model = fake_model(fp32, FakeEngine(lambda _: stop, capacity=60))
    assert model.manifest.prompt.image.tokens_per_tile * 5 >= 60
    monkeypatch.setattr("lorgnette.runtime.chat.prepare", resized)
    with pytest.raises(RequestError, match="does not fit"):
        model.chat().send("Hm", [picture(9, 9)]).result()


# Manifests that lie

PROMPT_LIES: dict[str, Callable[[Json], None]] = {
    "no role system": lambda p: p["turns"].pop("system"),
    "a task without a picture": lambda p: p.update(tasks={"ocr": "read"}),
    "a task with two pictures": lambda p: p.update(tasks={"ocr": "{image}{image}"}),
    "a task with an image token": lambda p: p.update(tasks={"ocr": "{image}<image>"}),
    "a picture without a place": lambda p: p["image"].update(single="<global-img>"),
    "a picture with two places": lambda p: p["image"].update(single="{image}{image}"),
    "image tokens of a tile": lambda p: p["image"].update(tokens_per_tile=1),
    "no image token": lambda p: p["image"].update(image_token=""),
    "a header of space": lambda p: p.update(answer_header=" \n"),
}


@pytest.mark.parametrize("lie", PROMPT_LIES)
def test_a_prompt_that_lies_is_refused_at_opening(omni: Path, tmp_path: Path, lie: str) -> None:
    def change(manifest: Json) -> None:
        PROMPT_LIES[lie](manifest["prompt"])

    bundle = edit_manifest(copy_bundle(omni, tmp_path / "b.lorg"), change)
    with pytest.raises(BundleError, match="does not fit together"):
        open_model(bundle, threads=1)


def test_tasks_of_split_pictures_are_refused(fp32: Path, tmp_path: Path) -> None:
    bundle = edit_manifest(
        copy_bundle(fp32, tmp_path / "b.lorg"), lambda m: m["prompt"].update(tasks={"ocr": OCR})
    )
    with pytest.raises(BundleError, match=r"tasks in .*: got ocr, wanted pictures of one tile"):
        open_model(bundle, threads=1)


def test_a_header_without_tokens_is_refused(omni: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a tokenizer that leaves out what it does not know."""
    monkeypatch.setattr("lorgnette.runtime.tokenizer.Tokenizer.encode", lambda *_: [])
    with pytest.raises(BundleError, match="makes no tokens of the answer's header"):
        open_model(omni, threads=1)


def test_the_grid_of_a_square_is_none(omni: Path) -> None:
    model = open_model(omni, threads=1)
    assert model.generate(picture(20, 90), "Hm", max_new_tokens=1).result().prompt_tokens == len(
        prompt_ids(model, Message("user", (ImagePart(), "Hm")))
    )
