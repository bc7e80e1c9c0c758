"""Generating one answer, exactly: an engine that answers what the test wants."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorgnette.errors import RequestError
from lorgnette.runtime import chat as chat_module
from lorgnette.runtime import pictures as pictures_module
from lorgnette.runtime.model import Model
from lorgnette.runtime.prompt import (
    Message,
    render_prompt,
)
from lorgnette.runtime.tokenizer import Tokenizer
from tests.runtime.support import (
    FakeEngine,
    fake_model,
    held,
    picture,
    prompt_ids,
    script,
    user,
)

QUESTION = "What is it?"


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
