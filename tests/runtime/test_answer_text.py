"""Text without the header that a model writes before its answer, against a plain definition."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorgnette.runtime.answer_text import AnswerText
from lorgnette.runtime.tokenizer import Tokenizer
from tests.runtime.families import small_llama, small_qwen

QWEN, LLAMA = small_qwen()[0], small_llama()[0]
HEADER = "<|im_start|>assistant"
IDS = QWEN.encode(HEADER)
LINE, LINES = QWEN.encode("\n"), QWEN.encode("\n\n")


def written(tokenizer: Tokenizer, header: str, ids: Sequence[int]) -> list[str]:
    """What each token brings, and the end."""
    answer = AnswerText(tokenizer, header)
    return [*[answer.push(i) for i in ids], answer.finish()]


def is_space(tokenizer: Tokenizer, token_id: int) -> bool:
    special = token_id in tokenizer.added_ids
    return not special and not tokenizer.decode([token_id]).strip()


def whole(tokenizer: Tokenizer, header: str, ids: Sequence[int]) -> str:
    """Oracle: the first end of white space and header, looked for in the finished answer."""
    wanted = tokenizer.encode(header)
    if not wanted:
        return tokenizer.decode(ids)

    def spaces(count: int) -> bool:
        return all(is_space(tokenizer, i) for i in ids[:count])

    for end in range(len(ids) + 1):
        start = end - len(wanted)
        if start >= 0 and list(ids[start:end]) == wanted and spaces(start):
            return tokenizer.decode(ids[end:]).lstrip()
    for start in range(len(ids) + 1):
        if spaces(start) and list(ids[start:]) == wanted[: len(ids) - start]:
            return ""  # all of it could still have become a header
    return tokenizer.decode(ids)


def test_the_header_is_left_out_with_the_white_space_around_it() -> None:
    red = QWEN.encode("Red dot. ")
    for before in ([], LINE, LINES, [*LINE, *LINES]):
        for behind in ([], LINE, [*LINES, *LINE], QWEN.encode("  ")):
            pieces = written(QWEN, HEADER, [*before, *IDS, *behind, *red])
            assert "".join(pieces) == "Red dot. "
            quiet = len(before) + len(IDS) + len(behind)
            assert pieces[: quiet + 1] == [*[""] * quiet, "R"], "text comes as soon as it is there"


def test_white_space_without_a_header_is_kept() -> None:
    ids = [*LINES, *QWEN.encode(" red\n")]
    assert written(QWEN, HEADER, ids)[:2] == ["", "\n\n red"]
    assert "".join(written(QWEN, HEADER, ids)) == "\n\n red\n"


def test_a_second_header_is_text() -> None:
    ids = [*IDS, *LINE, *QWEN.encode("a"), *IDS, *LINE, *QWEN.encode("b")]
    assert "".join(written(QWEN, HEADER, ids)) == "aassistant\nb"


@pytest.mark.parametrize("length", range(1, len(IDS)))
def test_the_beginning_of_a_header_alone_is_text_again(length: int) -> None:
    ids = [*LINE, *IDS[:length], *QWEN.encode("x")]
    assert "".join(written(QWEN, HEADER, ids)) == QWEN.decode(ids)
    assert QWEN.decode(ids).startswith("\n")


@pytest.mark.parametrize("length", range(len(IDS) + 2))
def test_an_answer_that_ends_inside_the_header_has_no_text(length: int) -> None:
    ids = [*LINE, *IDS, *LINE][:length]
    assert "".join(written(QWEN, HEADER, ids)) == ""


def test_without_a_header_everything_passes() -> None:
    ids = [*LINE, *IDS, *QWEN.encode(" x")]
    assert written(QWEN, "", ids)[0] == "\n"
    assert "".join(written(QWEN, "", ids)) == QWEN.decode(ids)


def test_half_a_character_behind_the_header_is_one_at_the_end() -> None:
    half = QWEN.encode("🙂")[:2]
    assert "".join(written(QWEN, HEADER, [*IDS, *LINE, *half])) == "\ufffd"
    assert "".join(written(QWEN, HEADER, half)) == "\ufffd"


# A header of plain text, one that begins with white space, and one that is a word and again.
HEADERS = (HEADER, "assistant", "\n\nuser", "\n", "", "\n<|im_end|>\n", "a<|im_end|>a", "  a")
PARTS = st.sampled_from(
    ["\n", "\n\n", " ", "  ", "a", "user", "assistant", " red", "é", "<|im_start|>", "<|im_end|>"]
)
BYTES = QWEN.encode("🙂")


@settings(max_examples=600, deadline=None)
@given(
    header=st.sampled_from(HEADERS),
    before=st.lists(PARTS, max_size=4),
    cut=st.integers(0, 5),
    behind=st.lists(PARTS | st.sampled_from(BYTES), max_size=5),
)
@example(header="a<|im_end|>a", before=["a", "<|im_end|>"], cut=5, behind=[])
@example(header="\n\nuser", before=["\n\n", "\n\n", "\n\n"], cut=5, behind=["a"])
@example(header="\n<|im_end|>\n", before=["\n", "\n"], cut=2, behind=["\n", "a"])
def test_any_answer_is_what_the_definition_says(
    header: str, before: list[str], cut: int, behind: list[str | int]
) -> None:
    ids = [i for part in before for i in QWEN.encode(part)] + QWEN.encode(header)[:cut]
    for part in behind:
        ids += [part] if isinstance(part, int) else QWEN.encode(part)
    assert "".join(written(QWEN, header, ids)) == whole(QWEN, header, ids)


@settings(max_examples=300, deadline=None)
@given(
    header=st.sampled_from(["ASSISTANT:", "</s> Red", "", "\n"]),
    before=st.lists(st.sampled_from("▁\n") | st.just("<0x0A>"), max_size=3),
    cut=st.integers(0, 12),
    behind=st.lists(
        st.sampled_from(["▁", "▁▁", "▁Red", "Red", "\n", "<0x0A>", "<0xC3>", "<0xA9>", "</s>"]),
        max_size=5,
    ),
)
@example(header="ASSISTANT:", before=["▁"], cut=0, behind=["▁Red"])
@example(header="ASSISTANT:", before=[], cut=12, behind=["▁", "▁Red"])
@example(header="", before=["▁"], cut=0, behind=["▁Red"])
def test_llamas_answers_are_what_the_definition_says(
    header: str, before: list[str], cut: int, behind: list[str]
) -> None:
    ids = [LLAMA.token_id(token) for token in before]
    ids += LLAMA.encode(header)[:cut] + [LLAMA.token_id(token) for token in behind]
    assert "".join(written(LLAMA, header, ids)) == whole(LLAMA, header, ids)
