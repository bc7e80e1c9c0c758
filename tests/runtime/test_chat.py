"""Conversations: what is kept of failed turns, further turns, and the real engine."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from lorgnette.errors import BundleError, ImageError, RequestError
from lorgnette.runtime import chat as chat_module
from lorgnette.runtime import pictures as pictures_module
from lorgnette.runtime.generation import Request
from lorgnette.runtime.model import Model
from lorgnette.runtime.prompt import (
    ImagePart,
    Message,
    answer_message,
)
from lorgnette.runtime.sampler import SamplingParams
from lorgnette.runtime.tokenizer import Tokenizer
from lorgnette.spec import TurnTemplate
from tests.runtime.support import (
    PICTURE_ID,
    FakeEngine,
    fake_model,
    held,
    picture,
    prompt_ids,
    script,
    user,
)

QUESTION = "What is it?"


# Errors


def fail_at(number: int) -> object:
    def hook(count: int) -> None:
        if count == number:
            raise BundleError("the engine failed")

    return hook


@pytest.mark.parametrize(("encode_call", "run_call"), [(1, 0), (2, 0), (0, 1), (0, 2)])
def test_an_error_before_the_first_token_keeps_nothing(
    fp32: Path, stop: int, monkeypatch: pytest.MonkeyPatch, encode_call: int, run_call: int
) -> None:
    monkeypatch.setattr(chat_module, "PREFILL_CHUNK", 50)
    monkeypatch.setattr(pictures_module, "TILES_PER_CALL", 4)
    engine = FakeEngine(lambda _: stop)
    model = fake_model(fp32, engine)
    engine.on_encode, engine.on_run = fail_at(encode_call), fail_at(run_call)  # type: ignore[assignment]
    chat = model.chat()
    generation = chat.send(QUESTION, [picture(60, 60)])
    with pytest.raises(BundleError, match="the engine failed"):
        generation.result()
    with pytest.raises(RequestError, match="not finished"):
        generation.result()
    engine.on_encode = engine.on_run = lambda count: None
    chat.send("Hm").result()
    assert held(chat) == prompt_ids(model, user("Hm"))


def test_logits_that_are_no_numbers_keep_nothing(fp32: Path, stop: int) -> None:
    engine = FakeEngine(lambda _: stop)
    model = fake_model(fp32, engine)
    chat = model.chat()
    state = chat._state
    run = state.run
    state.run = lambda *given: run(*given) * np.float32("nan")  # type: ignore[method-assign]
    with pytest.raises(BundleError, match="not all finite"):
        chat.send(QUESTION).result()
    state.run = run  # type: ignore[method-assign]
    chat.send("Hm").result()
    assert held(chat) == prompt_ids(model, user("Hm"))


def test_an_error_while_decoding_keeps_what_came(
    fp32: Path, tokenizer: Tokenizer, stop: int
) -> None:
    a = tokenizer.encode("a")[0]
    engine = FakeEngine(lambda _: a)
    model = fake_model(fp32, engine)
    engine.on_run = fail_at(4)  # type: ignore[assignment]
    chat = model.chat()
    pieces: list[str] = []
    with pytest.raises(BundleError, match="the engine failed"):
        pieces.extend(chat.send(QUESTION))
    engine.answer = lambda _: stop
    chat.send("And?").result()
    assert "Assistant:aaa<" in tokenizer.decode(held(chat), skip_special=False)
    # Every position holds what the conversation says: nothing of the failed call was relied on.
    assert held(chat) == chat._context.ids[: len(held(chat))]


def test_a_bad_picture_keeps_nothing(faked: tuple[Model, FakeEngine], stop: int) -> None:
    model, engine = faked
    engine.answer = lambda _: stop
    chat = model.chat()
    with pytest.raises(ImageError):
        chat.send(QUESTION, [b"no picture"]).result()
    with pytest.raises(RequestError, match="special token"):
        chat.send("<image>").result()
    chat.send("Hm").result()
    assert held(chat) == prompt_ids(model, user("Hm"))


def test_a_failed_turn_that_wrote_over_the_last_answer_is_undone(
    fp32: Path, tokenizer: Tokenizer, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the end of an answer and the text behind it share a token, a turn rewrites both."""
    whole, first = next(
        (token, token[:1])
        for token in ("ing", "ange", "here", "ellow")
        if len(tokenizer.encode(token)) == 1
    )
    turn = TurnTemplate(header="User: ", header_image_first="User:", footer=f"{whole[1:]}\n")
    engine = FakeEngine(lambda _: stop)
    model = fake_model(fp32, engine)
    prompt = msgspec.structs.replace(model.manifest.prompt, turns={"user": turn, "assistant": turn})
    manifest = msgspec.structs.replace(model.manifest, prompt=prompt)
    object.__setattr__(model.bundle, "manifest", manifest)
    # The cache holds two copies of the first letter; the next turn makes a token of the last.
    engine.answer = script(tokenizer.encode(first) * 2, stop)
    chat = model.chat()
    chat.send(QUESTION, (), Request(max_new_tokens=3)).result()
    before = list(chat._context.ids[:-1])
    monkeypatch.setattr(chat_module, "PREFILL_CHUNK", 1)
    number = len(engine.runs)
    engine.on_run = fail_at(number + 3)  # type: ignore[assignment]
    with pytest.raises(BundleError, match="the engine failed"):
        chat.send("And?").result()
    assert held(chat)[: len(before)] != before, "the turn was meant to write over the answer"
    filled = chat._filled
    assert held(chat)[:filled] == chat._context.ids[:filled], "the cache counts what is not there"
    engine.on_run = lambda count: None
    engine.answer = lambda _: stop
    chat.send("!").result()
    assert held(chat) == chat._context.ids[:-1]


@pytest.mark.parametrize(
    "request_of",
    [
        lambda: Request(max_new_tokens=0),
        lambda: Request(max_new_tokens=True),
        lambda: Request(max_new_tokens=2.5),  # type: ignore[arg-type]
        lambda: Request(max_new_tokens="9"),  # type: ignore[arg-type]
        lambda: Request(stop=("",)),
        lambda: Request(sampling=SamplingParams(temperature=-1)),
    ],
)
def test_requests_are_checked_when_they_are_made(request_of: object) -> None:
    with pytest.raises(RequestError):
        request_of()  # type: ignore[operator]


# Further turns


def test_a_further_turn_prefills_only_what_is_new(
    fp32: Path, tokenizer: Tokenizer, stop: int
) -> None:
    engine = FakeEngine(lambda _: stop)
    model = fake_model(fp32, engine)
    chat = model.chat("Be brief.")
    engine.answer = script(tokenizer.encode(" A red dot."), stop)
    first = chat.send(QUESTION).result()
    runs = len(engine.runs)
    second = chat.send("Where?").result()
    history = [
        Message("system", ("Be brief.",)),
        user(QUESTION),
        answer_message(model.manifest.prompt, first.text),
        user("Where?"),
    ]
    ids = prompt_ids(model, *history)
    assert held(chat) == ids
    # The stop token was chosen but never fed: it is the first of the new positions.
    fed = first.prompt_tokens + len(first.token_ids) - 1
    assert engine.runs[runs] == (fed, len(ids) - fed)
    assert second.prefilled_tokens == len(ids) - fed
    assert (second.prompt_tokens, second.image_tokens, second.tiles) == (len(ids), 0, 0)


def test_an_answer_cut_by_its_length_is_continued(
    fp32: Path, tokenizer: Tokenizer, stop: int
) -> None:
    engine = FakeEngine(lambda _: stop)
    model = fake_model(fp32, engine)
    chat = model.chat()
    engine.answer = script(tokenizer.encode(" A red dot."), stop)
    first = chat.send(QUESTION, (), Request(max_new_tokens=2)).result()
    assert first.finish_reason == "length"
    engine.answer = lambda _: stop
    second = chat.send("Where?").result()
    history = [user(QUESTION), answer_message(model.manifest.prompt, first.text), user("Where?")]
    assert held(chat) == prompt_ids(model, *history)
    assert second.prefilled_tokens == second.prompt_tokens - (first.prompt_tokens + 1)


def test_an_answer_cut_by_a_stop_string_stays_as_generated(
    fp32: Path, tokenizer: Tokenizer, stop: int
) -> None:
    engine = FakeEngine(script(tokenizer.encode(" A red dot."), stop))
    model = fake_model(fp32, engine)
    chat = model.chat()
    first = chat.send(QUESTION, (), Request(stop=("red",))).result()
    assert (first.text, first.finish_reason) == (" A ", "stop_string")
    engine.answer = lambda _: stop
    chat.send("Where?").result()
    assert "Assistant: A red<" in tokenizer.decode(held(chat), skip_special=False)


def test_pictures_of_several_turns_stand_at_their_places(
    fp32: Path, tokenizer: Tokenizer, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_module, "PREFILL_CHUNK", 7)
    word = tokenizer.encode(" dot")
    # Asked behind every piece of the prompt, so the answer goes by what stands last.
    follows = dict(zip(word, [*word[1:], stop], strict=True))
    engine = FakeEngine(lambda context: follows.get(context[-1], word[0]))
    model = fake_model(fp32, engine)
    one, two, three = (picture(*size, seed=i) for i, size in enumerate([(9, 9), (10, 40), (9, 7)]))
    chat = model.chat()
    first = chat.send(QUESTION, [one, two]).result()
    second = chat.send("And this?", [three]).result()
    fresh = fake_model(fp32, other := FakeEngine(lambda _: stop))
    wanted = []
    for source in (one, two, three):
        tiles = fresh.generate([source], "x").result().tiles
        wanted.append(tiles)
    assert (first.tiles, second.tiles) == (wanted[0] + wanted[1], wanted[2])
    parts = [ImagePart(2, 2), ImagePart(1, 2), ImagePart(2, 2)]
    ids = prompt_ids(
        model,
        Message("user", (*parts[:2], QUESTION)),
        Message("assistant", ("dot",)),
        Message("user", (parts[2], "And this?")),
    )
    tokens = [int(row[0]) for row in np.concatenate([p.tokens for p in chat._context.pictures])]
    image = model.manifest.spec.image_token_id
    spliced = iter(tokens)
    assert held(chat)[: len(ids)] == [next(spliced) if i == image else i for i in ids]
    assert next(spliced, None) is None
    assert all(token <= PICTURE_ID for token in tokens)
    assert second.image_tokens == len(tokens) == ids.count(image)
    assert other.tiles


def test_a_generated_image_token_is_no_picture(fp32: Path, tokenizer: Tokenizer, stop: int) -> None:
    engine = FakeEngine(lambda _: stop)
    model = fake_model(fp32, engine)
    image = model.manifest.spec.image_token_id
    chat = model.chat()
    engine.answer = script([image, image], stop)
    chat.send(QUESTION, [picture(9, 9)]).result()
    second = chat.send("And this?", [picture(7, 9, seed=1)]).result()
    tokens = [int(row[0]) for row in np.concatenate([p.tokens for p in chat._context.pictures])]
    assert second.image_tokens == len(tokens)
    assert [i for i in held(chat) if i <= PICTURE_ID] == tokens
    assert held(chat).count(image) == 2


# The real engine


def fresh_answer(
    model: Model, messages: list[Message], pictures: list[object], count: int
) -> list[int]:
    """Oracle: the whole conversation at once into an empty cache, token by token greedily."""
    engine = model.engine
    ids = prompt_ids(model, *messages)
    embeddings = engine.embed(np.array(ids))
    tokens = [p.tokens for p in pictures]  # type: ignore[attr-defined]
    if tokens:
        slots = np.array(ids) == model.manifest.spec.image_token_id
        embeddings[slots] = np.concatenate(tokens)
    state = engine.new_state()
    answer = [int(state.run(embeddings, 0).argmax())]
    while len(answer) < count and answer[-1] not in model.manifest.prompt.stop_token_ids:
        logits = state.run(engine.embed(np.array(answer[-1:])), len(ids) + len(answer) - 1)
        answer.append(int(logits.argmax()))
    return answer


@pytest.mark.parametrize("limit", [2, 40])
def test_three_turns_answer_as_the_whole_conversation_would(model: Model, limit: int) -> None:
    chat = model.chat()
    pictures = [picture(40, 90, seed=3), picture(64, 64, seed=4)]
    turns = [("What do you see?", [pictures[0]]), ("Where?", []), ("And here?", [pictures[1]])]
    messages: list[Message] = []
    filled = 0
    for question, images in turns:
        result = chat.send(question, images, Request(max_new_tokens=limit)).result()
        seen = chat._context.pictures
        parts = [ImagePart(p.rows, p.cols) for p in seen[len(seen) - len(images) :]]
        messages.append(Message("user", (*parts[: len(images)], question)))
        assert list(result.token_ids) == fresh_answer(model, messages, list(seen), limit)
        assert result.prompt_tokens == len(prompt_ids(model, *messages))
        assert result.prefilled_tokens == result.prompt_tokens - filled
        filled = result.prompt_tokens + len(result.token_ids) - 1
        messages.append(answer_message(model.manifest.prompt, result.text))


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_prefill_in_chunks_answers_the_same(
    model: Model, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    source = picture(50, 120, seed=8)
    wanted = model.generate(source, "How many?", max_new_tokens=24).result()
    monkeypatch.setattr(chat_module, "PREFILL_CHUNK", chunk)
    got = model.generate(source, "How many?", max_new_tokens=24).result()
    assert got.token_ids == wanted.token_ids
    assert got.prefilled_tokens == wanted.prefilled_tokens == wanted.prompt_tokens


def test_a_real_chat_goes_on_after_cancelled_and_failed_turns(model: Model) -> None:
    source = picture(30, 30, seed=5)
    undisturbed = model.chat()
    wanted = [undisturbed.send(q, p).result() for q, p in (("What?", [source]), ("Where?", []))]
    chat = model.chat()
    first = chat.send("What?", [source]).result()
    cancelled = chat.send("Never mind " * 20)
    cancelled.cancel()
    assert cancelled.result().finish_reason == "cancelled"
    with pytest.raises(RequestError, match="does not fit"):
        chat.send("long " * 2000).result()
    second = chat.send("Where?").result()
    assert [first.token_ids, second.token_ids] == [r.token_ids for r in wanted]
