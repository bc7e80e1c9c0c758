"""Generating an answer, exactly: an engine that answers what the test wants, and the real one."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorgnette.errors import BundleError, ImageError, RequestError
from lorgnette.runtime import chat as chat_module
from lorgnette.runtime import pictures as pictures_module
from lorgnette.runtime.chat import Chat
from lorgnette.runtime.generation import Request
from lorgnette.runtime.model import Model
from lorgnette.runtime.prompt import (
    ImagePart,
    Message,
    answer_message,
    encode_prompt,
    render_prompt,
)
from lorgnette.runtime.sampler import SamplingParams
from lorgnette.runtime.tokenizer import Tokenizer
from lorgnette.spec import PromptSpec, TurnTemplate
from tests.runtime.support import PICTURE_ID, FakeEngine, fake_model, picture, script

QUESTION = "What is it?"


@pytest.fixture(scope="module")
def tokenizer(model: Model) -> Tokenizer:
    return model.tokenizer


@pytest.fixture(scope="module")
def spec(model: Model) -> PromptSpec:
    return model.manifest.prompt


@pytest.fixture(scope="module")
def stop(spec: PromptSpec) -> int:
    return spec.stop_token_ids[0]


@pytest.fixture(scope="module")
def faked(fp32: Path, stop: int) -> tuple[Model, FakeEngine]:
    """One model for tests that set the answer themselves."""
    engine = FakeEngine(lambda _: stop)
    return fake_model(fp32, engine), engine


def held(chat: Chat) -> list[int]:
    """What a fake cache holds; image tokens as they were encoded."""
    return chat._state.held  # type: ignore[attr-defined,no-any-return]


def prompt_ids(model: Model, *messages: Message) -> list[int]:
    return encode_prompt(model.manifest.prompt, model.tokenizer, list(messages))


def user(text: str) -> Message:
    return Message("user", (text,))


# Text in pieces


WRITING = st.text(
    st.characters(codec="utf-8") | st.sampled_from("é日本🙂👩‍🚀ﬁ\u0301 \n"),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(text=WRITING)
@example(text="héllo 日本語 🙂👩‍🚀")
@example(text="")
def test_pieces_are_the_text_and_whole_characters(
    faked: tuple[Model, FakeEngine], stop: int, text: str
) -> None:
    model, engine = faked
    ids = model.tokenizer.encode(text)
    engine.answer = script(ids, stop)
    generation = model.generate((), QUESTION)
    pieces = list(generation)
    result = generation.result()
    # The text stands here as it was written: the tokenizer itself takes no part in the check.
    assert "".join(pieces) == result.text == text
    assert all(pieces)
    assert result.token_ids == (*ids, stop)
    assert result.finish_reason == "stop"
    for piece in pieces:
        assert "\ufffd" not in piece or "\ufffd" in text


def test_a_character_spread_over_tokens_comes_with_the_last(
    faked: tuple[Model, FakeEngine], stop: int
) -> None:
    model, engine = faked
    ids = model.tokenizer.encode("🙂")
    assert len(ids) == 4, "this tokenizer has a token for it: choose another character"
    engine.answer = script([*ids, *ids], stop)
    before = len(engine.runs)
    generation = model.generate((), QUESTION)
    assert next(generation) == "🙂"
    assert len(engine.runs) - before == 4  # the prompt and three of the four tokens
    assert list(generation) == ["🙂"]


def test_half_a_character_at_the_end_is_a_replacement_character(
    faked: tuple[Model, FakeEngine], stop: int
) -> None:
    model, engine = faked
    ids = [*model.tokenizer.encode("a"), *model.tokenizer.encode("🙂")[:2]]
    engine.answer = script(ids, stop)
    generation = model.generate((), QUESTION)
    assert list(generation) == ["a", "\ufffd"]
    assert generation.result().text == "a\ufffd" == model.tokenizer.decode(ids)


def test_special_tokens_are_no_text(faked: tuple[Model, FakeEngine], stop: int) -> None:
    model, engine = faked
    image = model.manifest.spec.image_token_id
    a, b = model.tokenizer.encode("a")[0], model.tokenizer.encode("b")[0]
    engine.answer = script([a, image, b], stop)
    result = model.generate((), QUESTION).result()
    assert (result.text, result.token_ids) == ("ab", (a, image, b, stop))


# How an answer ends


def cut_at_stop(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """Oracle: reads on character by character until some stop string is complete."""
    for end in range(1, len(text) + 1):
        done = [s for s in stops if text[:end].endswith(s)]
        if done:
            return text[: end - max(map(len, done))], True
    return text, False


@settings(max_examples=80, deadline=None)
@given(
    text=st.text("ab é🙂", max_size=24),
    stops=st.lists(st.text("ab é🙂", min_size=1, max_size=5), max_size=3).map(tuple),
)
@example(text="The red circle", stops=("d c",))
@example(text="aab", stops=("ab", "b", "aab"))
def test_stop_strings_end_the_answer_wherever_tokens_are_cut(
    faked: tuple[Model, FakeEngine], stop: int, text: str, stops: tuple[str, ...]
) -> None:
    model, engine = faked
    engine.answer = script(model.tokenizer.encode(text), stop)
    generation = model.generate((), QUESTION, stop=stops)
    pieces = list(generation)
    result = generation.result()
    wanted, hit = cut_at_stop(text, stops)
    assert "".join(pieces) == result.text == wanted
    assert result.finish_reason == ("stop_string" if hit else "stop")


def test_a_single_stop_string_is_not_its_characters(
    faked: tuple[Model, FakeEngine], stop: int
) -> None:
    model, engine = faked
    engine.answer = script(model.tokenizer.encode("cab ab"), stop)
    assert model.generate((), QUESTION, stop="ab").result().text == "c"


@pytest.mark.parametrize("length", [1, 2, 7])
def test_the_length_is_exact_and_nothing_runs_behind_it(
    faked: tuple[Model, FakeEngine], length: int
) -> None:
    model, engine = faked
    a = model.tokenizer.encode("a")[0]
    engine.answer = lambda _: a
    before = len(engine.runs)
    result = model.generate((), QUESTION, max_new_tokens=length).result()
    assert result.token_ids == (a,) * length
    assert (result.text, result.finish_reason) == ("a" * length, "length")
    assert len(engine.runs) - before == length  # the prompt, then all tokens but the last
    assert result.decode_tokens_per_s == 0 or length > 1


def test_a_stop_token_at_the_very_length_counts_as_stop(
    faked: tuple[Model, FakeEngine], stop: int
) -> None:
    model, engine = faked
    engine.answer = script(model.tokenizer.encode("ab"), stop)
    result = model.generate((), QUESTION, max_new_tokens=3).result()
    assert (result.finish_reason, len(result.token_ids)) == ("stop", 3)


@pytest.mark.parametrize("room", [1, 2, 5])
def test_the_context_is_filled_to_its_last_position(
    fp32: Path, tokenizer: Tokenizer, stop: int, room: int
) -> None:
    a = tokenizer.encode("a")[0]
    engine = FakeEngine(lambda _: a)
    model = fake_model(fp32, engine)
    engine.capacity = len(prompt_ids(model, user(QUESTION))) + room
    chat = model.chat()
    result = chat.send(QUESTION).result()
    assert result.finish_reason == "context_full"
    # One token for every free position, and the one behind the last of them.
    assert len(result.token_ids) == room + 1
    assert len(held(chat)) == engine.capacity
    with pytest.raises(RequestError, match="does not fit"):
        chat.send("And?").result()


@pytest.mark.parametrize("missing", [0, 1, 40])
def test_a_prompt_that_does_not_fit_leaves_the_chat_usable(
    fp32: Path, tokenizer: Tokenizer, stop: int, missing: int
) -> None:
    engine = FakeEngine(lambda _: stop)
    model = fake_model(fp32, engine)
    engine.capacity = len(prompt_ids(model, user(QUESTION + "?" * missing)))
    chat = model.chat()
    with pytest.raises(RequestError, match=r"does not fit the context: got \d+ tokens, wanted"):
        chat.send(QUESTION + "?" * missing).result()
    assert engine.runs == []
    result = chat.send("Hm").result()
    assert (result.finish_reason, result.prompt_tokens) == (
        "stop",
        len(prompt_ids(model, user("Hm"))),
    )


# Cancelling, from another thread


class Canceller:
    """Cancels from a thread of its own while the engine waits."""

    def __init__(self) -> None:
        self._go, self._done = threading.Event(), threading.Event()
        self.generation: object = None

    def __enter__(self) -> Canceller:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._go.set()
        self._thread.join()

    def _run(self) -> None:
        self._go.wait(10)
        if self.generation is not None:
            self.generation.cancel()  # type: ignore[attr-defined]
        self._done.set()

    def now(self) -> None:
        """Called inside the engine."""
        self._go.set()
        assert self._done.wait(10)


def test_cancel_while_decoding_ends_at_the_next_token(
    fp32: Path, tokenizer: Tokenizer, stop: int
) -> None:
    a = tokenizer.encode("a")[0]
    engine = FakeEngine(lambda _: a)
    model = fake_model(fp32, engine)
    chat = model.chat()
    with Canceller() as canceller:
        engine.on_run = lambda count: canceller.now() if count == 4 else None
        canceller.generation = generation = chat.send(QUESTION)
        result = generation.result()
    assert generation.is_cancelled
    assert (result.finish_reason, result.text) == ("cancelled", "aaaa")
    # The partial answer stays: the next turn comes behind it.
    engine.answer = lambda _: stop
    further = chat.send("And?").result()
    whole = [user(QUESTION), Message("assistant", ("aaaa",)), user("And?")]
    # The answer had no leading space, so only its text is the same as in a rendered history.
    assert further.finish_reason == "stop"
    text = tokenizer.decode(held(chat), skip_special=False)
    assert text == render_prompt(model.manifest.prompt, whole).replace(" aaaa", "aaaa")


def test_cancel_while_encoding_pictures_keeps_nothing(
    fp32: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    monkeypatch.setattr(pictures_module, "TILES_PER_CALL", 4)
    engine = FakeEngine(lambda _: stop)
    model = fake_model(fp32, engine)
    chat = model.chat()
    with Canceller() as canceller:
        engine.on_encode = lambda count: canceller.now()
        canceller.generation = generation = chat.send(QUESTION, [picture(60, 60)])
        result = generation.result()
    assert engine.tiles == [4], "five tiles take two calls, and the second must not come"
    assert engine.runs == []
    assert (result.finish_reason, result.text, result.token_ids) == ("cancelled", "", ())
    assert result.timings.vision > 0 or result.timings.preprocess > 0
    engine.on_encode = lambda count: None
    assert chat.send("Hm").result().prompt_tokens == len(prompt_ids(model, user("Hm")))


def test_cancel_between_pieces_of_the_prompt_keeps_nothing(
    fp32: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_module, "PREFILL_CHUNK", 3)
    engine = FakeEngine(lambda _: stop)
    model = fake_model(fp32, engine)
    chat = model.chat()
    with Canceller() as canceller:
        engine.on_run = lambda count: canceller.now() if count == 2 else None
        canceller.generation = generation = chat.send(QUESTION)
        assert generation.result().finish_reason == "cancelled"
    assert engine.runs == [(0, 3), (3, 3)]
    chat.send("Hm").result()
    assert held(chat) == prompt_ids(model, user("Hm"))


def test_cancel_before_the_first_piece_runs_nothing(faked: tuple[Model, FakeEngine]) -> None:
    model, engine = faked
    before = len(engine.runs), len(engine.tiles)
    generation = model.chat().send(QUESTION, [picture(8, 8, seed=77)])
    generation.cancel()
    generation.cancel()
    assert list(generation) == []
    assert generation.result().finish_reason == "cancelled"
    assert (len(engine.runs), len(engine.tiles)) == before


# One answer at a time


def test_a_second_question_is_refused_while_the_first_is_answered(
    faked: tuple[Model, FakeEngine], stop: int
) -> None:
    model, engine = faked
    engine.answer = script(model.tokenizer.encode("abc"), stop)
    chat = model.chat()
    first = chat.send(QUESTION)
    with pytest.raises(RequestError, match="still answering"):
        chat.send("And?")
    next(first)
    with pytest.raises(RequestError, match="still answering"):
        chat.send("And?")
    assert first.result().text == "abc"
    assert chat.send("And?").result().finish_reason == "stop"


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Without the cycle collector, what is dropped is freed by its count or never."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("pieces", [0, 1, 2])
def test_a_dropped_answer_frees_the_chat_and_stays(
    faked: tuple[Model, FakeEngine], stop: int, pieces: int
) -> None:
    model, engine = faked
    engine.answer = script(model.tokenizer.encode("abcdef"), stop)
    chat = model.chat()
    generation = chat.send(QUESTION)
    for _ in range(pieces):
        next(generation)
    del generation
    engine.answer = script([], stop)
    result = chat.send("And?").result()
    assert result.finish_reason == "stop"
    text = model.tokenizer.decode(held(chat), skip_special=False)
    given_before = render_prompt(model.manifest.prompt, [user(QUESTION)]) + "abcdef"[:pieces]
    assert text.startswith(given_before) == bool(pieces)
    assert text.endswith(
        f"User: And?{model.tokenizer.decode([stop], skip_special=False)}\nAssistant:"
    )


def test_a_closed_answer_has_no_result(faked: tuple[Model, FakeEngine], stop: int) -> None:
    model, engine = faked
    engine.answer = script(model.tokenizer.encode("abc"), stop)
    generation = model.generate((), QUESTION)
    next(generation)
    generation.close()
    generation.close()
    with pytest.raises(RequestError, match="not finished"):
        generation.result()


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
