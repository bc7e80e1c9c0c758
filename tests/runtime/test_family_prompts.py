"""Prompts with a system message of the model's own, with tasks, and of LLaMA's tokenizers."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from lorgnette.errors import RequestError
from lorgnette.runtime.prompt import (
    ImagePart,
    Message,
    TaskPart,
    answer_message,
    continue_prompt,
    encode_prompt,
    image_token_count,
    render_prompt,
)
from lorgnette.runtime.tokenizer import Tokenizer
from lorgnette.spec import PromptSpec, TurnTemplate
from tests.runtime.families import (
    VICUNA,
    Separately,
    mobilevlm_prompt,
    omnivlm_prompt,
    small_llama,
    small_qwen,
)
from tests.runtime.support import GOLDEN, shared_data, user

RECORDED = json.loads((GOLDEN / "text_family_prompts.json").read_text(encoding="utf-8"))
QUESTION = RECORDED["question"]
LLAMA, LLAMA_SEPARATELY = small_llama()
QWEN, QWEN_SEPARATELY = small_qwen()
KINDS = {
    "llama": (mobilevlm_prompt(3), LLAMA, LLAMA_SEPARATELY),
    "qwen": (omnivlm_prompt(3), QWEN, QWEN_SEPARATELY),
}
Kind = tuple[PromptSpec, Tokenizer, Separately]
texts = st.text(st.sampled_from("aRed \n?.é🙂"), max_size=10)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def asked(question: str = QUESTION) -> list[Message]:
    return [Message("user", (ImagePart(), question))]


def test_mobilevlm_ids_are_the_recorded_ones() -> None:
    tokenizer = Tokenizer.from_file(shared_data("tokenizers/llama2/tokenizer.json"))
    spec = mobilevlm_prompt()
    at = RECORDED["mobilevlm_ids"].index(-200)
    before, behind = RECORDED["mobilevlm_ids"][:at], RECORDED["mobilevlm_ids"][at + 1 :]
    assert encode_prompt(spec, tokenizer, asked()) == [*before, *[0] * 144, *behind]
    assert image_token_count(spec, asked()) == 144


def test_omnivlm_ids_are_the_recorded_ones() -> None:
    tokenizer = Tokenizer.from_file(shared_data("tokenizers/qwen2/tokenizer.json"))
    spec = omnivlm_prompt(stop=151645)
    at = RECORDED["omnivlm_ids"].index(151655)
    before, behind = RECORDED["omnivlm_ids"][:at], RECORDED["omnivlm_ids"][at + 1 :]
    assert encode_prompt(spec, tokenizer, asked()) == [*before, *[151655] * 81, *behind]
    task = encode_prompt(spec, tokenizer, [Message("user", (TaskPart("ocr"),))])
    assert task.count(151655) == 81
    start, text = tokenizer.encode("<|im_start|>user\n"), tokenizer.decode(task)
    assert tokenizer.encode(text.split("user\n")[1])[0] == tokenizer.encode(" <|ocr_start|>")[0]
    assert start == [151644, 872, 198]
    assert "user\n <|ocr_start|><|ocr_end|>" in text


def test_a_chat_with_llamas_own_tokenizer_stays_equal() -> None:
    """The published tokenizer, its parts encoded one by one."""
    tokenizer = Tokenizer.from_file(shared_data("tokenizers/llama2/tokenizer.json"))
    spec = mobilevlm_prompt(2)
    ids = encode_prompt(spec, tokenizer, asked("What?"))
    head = [1, *tokenizer.encode(VICUNA + " USER: "), 0, 0, *tokenizer.encode("\nWhat? ASSISTANT:")]
    assert ids == head
    context = [*ids, tokenizer.token_id("▁Red"), tokenizer.token_id("."), 2]
    turn = continue_prompt(spec, tokenizer, context, [user("Where?")])
    answered = tokenizer.encode("\nWhat? ASSISTANT: Red.")
    assert turn.ids == [
        *ids[: -len(tokenizer.encode("\nWhat? ASSISTANT:"))],
        *answered,
        2,
        *tokenizer.encode("USER: Where? ASSISTANT:"),
    ]
    assert turn.keep == len(context)


# The system message of the model's own


def test_the_default_system_message_stands_where_none_is_given(kind: Kind) -> None:
    spec, tokenizer, separately = kind
    own = spec.default_system
    system = spec.turns["system"]
    text = render_prompt(spec, asked())
    assert text.startswith(f"{spec.prefix}{system.header}{own}{system.footer}")
    assert encode_prompt(spec, tokenizer, asked()) == separately(text)
    given_one = [Message("system", ("Be brief.",)), *asked()]
    assert render_prompt(spec, given_one) == text.replace(str(own), "Be brief.")
    without = msgspec.structs.replace(spec, default_system=None)
    assert render_prompt(without, asked()) == text.replace(
        f"{system.header}{own}{system.footer}", ""
    )


def test_a_further_turn_does_not_repeat_the_system_message(kind: Kind) -> None:
    spec, tokenizer, _ = kind
    ids = encode_prompt(spec, tokenizer, asked())
    turn = continue_prompt(spec, tokenizer, [*ids, 2], [user("And?")])
    assert turn.ids[: len(ids)] == ids
    own = str(spec.default_system)
    assert own in tokenizer.decode(ids)
    assert own not in tokenizer.decode(turn.ids[len(ids) :])


def test_the_default_system_message_is_not_typed_text() -> None:
    """It may hold special tokens; one that a user brings may not."""
    spec = msgspec.structs.replace(omnivlm_prompt(1), default_system="Use <|vision_start|>.")
    ids = encode_prompt(spec, QWEN, [user("Hm")])
    assert QWEN.token_id("<|vision_start|>") in ids
    with pytest.raises(RequestError, match="special token"):
        encode_prompt(spec, QWEN, [Message("system", (str(spec.default_system),)), user("Hm")])


def test_a_default_system_message_may_be_empty() -> None:
    spec = msgspec.structs.replace(omnivlm_prompt(1), default_system="")
    assert render_prompt(spec, [user("Hm")]).startswith("<|im_start|>system\n<|im_end|>\n")


# Tasks


def test_a_task_is_the_users_whole_content() -> None:
    spec = omnivlm_prompt(3)
    message = Message("user", (TaskPart("ocr"),))
    image = "<|image_pad|>" * 3
    text = render_prompt(spec, [message])
    assert text.endswith(
        "<|im_start|>user\n"
        f" <|ocr_start|><|vision_start|>{image}<|vision_end|><|ocr_end|><|im_end|>"
    )
    ids = encode_prompt(spec, QWEN, [message])
    assert ids == QWEN_SEPARATELY(text)
    assert image_token_count(spec, [message]) == ids.count(QWEN.token_id("<|image_pad|>")) == 3
    both = [*asked(), Message("assistant", ("Red",)), message]
    assert image_token_count(spec, both) == 6
    further = continue_prompt(spec, QWEN, [*ids, 2], [message])
    assert further.ids.count(QWEN.token_id("<|image_pad|>")) == 6


def test_unknown_tasks_name_the_known_ones() -> None:
    spec = msgspec.structs.replace(omnivlm_prompt(), tasks={"ocr": "{image}", "find": "{image}"})
    with pytest.raises(RequestError, match="got 'ocd', wanted ocr or find"):
        render_prompt(spec, [Message("user", (TaskPart("ocd"),))])
    with pytest.raises(RequestError, match="the model has no tasks"):
        render_prompt(mobilevlm_prompt(), [Message("user", (TaskPart("ocr"),))])


def test_only_the_picture_is_filled_in() -> None:
    spec = msgspec.structs.replace(omnivlm_prompt(2), tasks={"x": "{row}{{image}}{0}"})
    text = render_prompt(spec, [Message("user", (TaskPart("x"),))])
    assert "user\n{row}{<|image_pad|><|image_pad|>}{0}<|im_end|>" in text


# Further turns


@settings(max_examples=150, deadline=None)
@given(
    answer=texts,
    further=st.lists(st.tuples(st.booleans(), texts, texts), min_size=1, max_size=3),
    stopped=st.booleans(),
    name=st.sampled_from(list(KINDS)),
)
@example(answer="Red.", further=[(False, "Where?", "dot")], stopped=True, name="llama")
@example(answer="Red", further=[(True, "", "  dot ")], stopped=False, name="llama")
@example(answer=" ", further=[(False, " ", "")], stopped=True, name="llama")
@example(answer="\n", further=[(False, "\n", "\n")], stopped=True, name="qwen")
def test_a_chat_gives_the_ids_of_the_whole_conversation(
    answer: str, further: list[tuple[bool, str, str]], stopped: bool, name: str
) -> None:
    """Wherever the model gave the ids that its text has."""
    spec, tokenizer, separately = KINDS[name]
    written = "\n<|im_start|>assistant\n" if name == "qwen" else " "
    message = asked("What?")[0]
    text = render_prompt(spec, [message])
    ids = encode_prompt(spec, tokenizer, [message])
    footer = spec.turns["assistant"].footer
    for with_picture, question, next_answer in further:
        text += written + answer
        canonical = separately(text)
        assume(canonical[: len(ids)] == ids)
        context = canonical + [2] * stopped
        message = Message("user", (ImagePart(), question) if with_picture else (question,))
        user_turn = spec.turns["user"]
        picture = spec.image.single.replace("{image}", spec.image.image_token * 3)
        text += footer + user_turn.header + picture * with_picture + question + user_turn.footer
        text += spec.generation
        turn = continue_prompt(spec, tokenizer, context, [message])
        assert turn.ids == separately(text)
        assert turn.keep == len(context)
        ids, answer = turn.ids, next_answer


@settings(max_examples=100, deadline=None)
@given(
    answer=st.lists(st.sampled_from(sorted(LLAMA.added_ids | set(range(60, 360)))), max_size=8),
    stopped=st.booleans(),
    name=st.sampled_from(list(KINDS)),
)
@example(answer=[LLAMA.token_id(letter) for letter in "▁Red"], stopped=False, name="llama")
@example(answer=[LLAMA.token_id("<0xF0>"), LLAMA.token_id("▁")], stopped=True, name="llama")
def test_the_ids_of_any_answer_stay(answer: list[int], stopped: bool, name: str) -> None:
    """Also of one that has other ids than its text, or no text that is whole."""
    spec, tokenizer, separately = KINDS[name]
    answer = [i for i in answer if i < tokenizer.vocab_size]
    context = [*encode_prompt(spec, tokenizer, asked("What?")), *answer]
    stop = [2] * stopped if not answer or answer[-1] != 2 else []
    turn = continue_prompt(spec, tokenizer, context + stop, [user("Where?")])
    kept = context[:-1] if context[-1] == 2 and not stop else context
    user_turn = spec.turns["user"]
    suffix = (
        spec.turns["assistant"].footer
        + f"{user_turn.header}Where?{user_turn.footer}{spec.generation}"
    )
    assert turn.ids == kept + separately(suffix)


def plain_llama_prompt() -> PromptSpec:
    """No special token at the end of an answer: the border is inside a text."""
    turns = {
        "user": TurnTemplate(header="USER: ", header_image_first="USER: ", footer=" "),
        "assistant": TurnTemplate(
            header="ASSISTANT: ", header_image_first="ASSISTANT: ", footer="\n"
        ),
    }
    return msgspec.structs.replace(mobilevlm_prompt(3), turns=turns, default_system=None)


@settings(max_examples=100, deadline=None)
@given(answer=texts, picture=st.booleans(), stopped=st.booleans())
@example(answer=" Red", picture=True, stopped=True)
@example(answer="?", picture=False, stopped=True)  # makes a token with the line break behind it
def test_llamas_tokens_across_the_end_of_an_answer_are_those_of_the_whole(
    answer: str, picture: bool, stopped: bool
) -> None:
    spec = plain_llama_prompt()
    first = asked("What?") if picture else [user("What?")]
    text = render_prompt(spec, first) + answer
    ids, canonical = encode_prompt(spec, LLAMA, first), LLAMA_SEPARATELY(text)
    assume(canonical[: len(ids)] == ids)
    turn = continue_prompt(spec, LLAMA, canonical + [2] * stopped, [user("And?")])
    whole = LLAMA_SEPARATELY(f"{text}\nUSER: And? ASSISTANT:")
    assert turn.ids == whole
    assert turn.ids[: turn.keep] == canonical[: turn.keep]
    assert turn.keep >= len(ids)


# Answers as history


def test_an_answer_in_the_history_has_the_header_of_its_role() -> None:
    spec = omnivlm_prompt(1)
    message = answer_message(spec, "Red.")
    assert message == Message("assistant", ("Red.",))
    text = render_prompt(spec, [user("What?"), message, user("Where?")])
    assert text.endswith(
        "<|im_start|>user\nWhat?<|im_end|><|im_start|>assistant\nRed.<|im_end|>\n"
        "<|im_start|>user\nWhere?<|im_end|>"
    )
    vicuna = mobilevlm_prompt(1)
    text = render_prompt(vicuna, [user("What?"), answer_message(vicuna, "Red."), user("Where?")])
    assert text.endswith("USER: What? ASSISTANT: Red.</s>USER: Where? ASSISTANT:")
