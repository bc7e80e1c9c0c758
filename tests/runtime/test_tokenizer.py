"""The tokenizer's wrapper, streaming text and stop strings, on SmolVLM's real tokenizer."""

from __future__ import annotations

import itertools
import json
import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorgnette.errors import BundleError, RequestError
from lorgnette.runtime import tokenizer as tokenizer_module
from lorgnette.runtime.tokenizer import StopStrings, Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "text_smolvlm_tokenizer.json.xz"
END = 49279  # <end_of_utterance>


@pytest.fixture(scope="module")
def source() -> bytes:
    return lzma.decompress(GOLDEN.read_bytes())


@pytest.fixture(scope="module")
def tokenizer(source: bytes, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(source)
    return Tokenizer.from_file(path)


@pytest.fixture(scope="module")
def oracle(source: bytes) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_buffer(source)


@pytest.fixture(scope="module")
def byte_ids(oracle: tokenizers.Tokenizer) -> list[int]:
    """The 256 tokens that are single bytes."""
    return [i for i in range(oracle.get_vocab_size()) if len(oracle.id_to_token(i) or "") == 1]


def streamed(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    stream = tokenizer.stream()
    return "".join([stream.push(i) for i in ids]) + stream.finish()


def test_encodes_as_published(tokenizer: Tokenizer) -> None:
    # The start of every SmolVLM chat.
    assert tokenizer.encode("<|im_start|>User:") == [1, 11126, 42]
    assert tokenizer.encode("<end_of_utterance>\nAssistant:") == [END, 198, 9519, 9531, 42]
    assert tokenizer.encode("") == []


def test_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 49280
    assert tokenizer.token_id("<image>") == 49190
    assert len(tokenizer.special_strings) == 145
    assert tokenizer.special_strings[:2] == ("<|endoftext|>", "<|im_start|>")
    assert "<row_6_col_6>" in tokenizer.special_strings
    assert END in tokenizer.added_ids
    with pytest.raises(BundleError, match="<pad>"):
        tokenizer.token_id("<pad>")


# The vocabulary lacks 21 bytes (six control characters and what begins planes 4 to 15), so such
# characters vanish in the reference too. All others come back.
present = st.characters(
    max_codepoint=0x3FFFF, exclude_categories=["Cs"], exclude_characters="\4\6\x13\x14\x16\x1d"
)


@given(text=st.text(present))
@settings(deadline=None)
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert streamed(tokenizer, ids) == text


@given(text=st.text())
@settings(deadline=None)
def test_encodes_like_the_library(
    tokenizer: Tokenizer, oracle: tokenizers.Tokenizer, text: str
) -> None:
    assert tokenizer.encode(text) == oracle.encode(text, add_special_tokens=False).ids


@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_pieces_join_to_the_one_shot_decode(
    tokenizer: Tokenizer, oracle: tokenizers.Tokenizer, byte_ids: list[int], data: st.DataObject
) -> None:
    ids = data.draw(
        st.lists(
            st.one_of(
                st.integers(0, 49279),
                st.sampled_from(byte_ids),  # incomplete and impossible UTF-8
                st.integers(49152, 49290),  # special and unknown ids
            ),
            max_size=30,
        )
    )
    wanted = oracle.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids) == wanted
    assert streamed(tokenizer, ids) == wanted


def test_every_byte_pair_streams_exactly(tokenizer: Tokenizer, byte_ids: list[int]) -> None:
    for pair in itertools.product(byte_ids, byte_ids[::7]):
        assert streamed(tokenizer, pair) == tokenizer.decode(pair)


def test_a_character_comes_whole_and_special_tokens_do_not_split_it(
    tokenizer: Tokenizer,
) -> None:
    stream = tokenizer.stream()
    byte = [tokenizer.token_id(c) for c in "ðŁĺĢ"]  # F0 9F 98 80, a smiling face
    assert [stream.push(i) for i in [*byte[:2], END, *byte[2:]]] == ["", "", "", "", "😀"]
    assert stream.push(byte[0]) == ""
    assert stream.finish() == "\ufffd"


def test_an_added_token_outside_the_byte_alphabet_stands_for_itself(source: bytes) -> None:
    backend = tokenizers.Tokenizer.from_buffer(source)
    backend.add_tokens(["two words é日"])
    wrapped = Tokenizer(backend, where="test")
    ids = wrapped.encode("a two words é日 b")
    assert 49280 in ids
    assert streamed(wrapped, ids) == wrapped.decode(ids) == "a two words é日 b"


LLAMA: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
    "model": {
        "type": "BPE",
        "byte_fallback": True,
        "merges": [],
        "vocab": {
            token: n
            for n, token in enumerate(
                [f"<0x{n:02X}>" for n in range(256)]
                + ["▁", "▁▁", "▁a", "b", "é", "▁c▁", "<0xZZ>", "<s>"]
            )
        },
    },
}


@given(
    ids=st.lists(
        st.one_of(
            st.integers(256, 264), st.sampled_from([0xE2, 0x82, 0xAC, 0x20, 0x41]), st.just(0x20)
        ),
        max_size=12,
    )
)
@settings(max_examples=300, deadline=None)
@example(ids=[256, 256, 0xE2, 0x82, 0xAC, 0xE2, 258])
@example(ids=[263, 256, 258])
def test_byte_fallback_streams_exactly(ids: list[int]) -> None:
    backend = tokenizers.Tokenizer.from_str(json.dumps(LLAMA))
    backend.add_special_tokens(["<s>"])
    assert streamed(Tokenizer(backend, where="test"), ids) == backend.decode(ids)


def test_padding_and_truncation_of_the_file_are_off(source: bytes) -> None:
    backend = tokenizers.Tokenizer.from_buffer(source)
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    wrapped = Tokenizer(backend, where="test")
    assert len(wrapped.encode("one two three")) == 3


def changed(source: bytes, **changes: Any) -> bytes:
    content = json.loads(source)
    for key, value in changes.items():
        content[key] = value
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "damaged"),
        (b"{", "damaged"),
        (b"\xff\xfe\x00", "damaged"),
        (b"[]", "damaged"),
        (b"{}", "damaged"),
        (b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":["a b"]}}', "damaged"),
        (b"[" * 100_000, "damaged"),
        (json.dumps(LLAMA | {"decoder": None}).encode(), "decoder"),
        (json.dumps(LLAMA | {"decoder": {"type": "Fuse"}}).encode(), "decoder"),
        (
            json.dumps(LLAMA | {"model": LLAMA["model"] | {"dropout": 0.1}}).encode(),
            "dropout",
        ),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, data: bytes, named: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(BundleError, match=named) as caught:
        Tokenizer.from_file(path)
    assert caught.value.where == str(path)


def test_missing_and_oversized_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BundleError, match="cannot be read"):
        Tokenizer.from_file(tmp_path / "none.json")
    with pytest.raises(BundleError, match="cannot be read"):
        Tokenizer.from_file(tmp_path)
    monkeypatch.setattr(tokenizer_module, "MAX_FILE_BYTES", 3)
    (tmp_path / "large.json").write_bytes(b"1234")
    with pytest.raises(BundleError, match="too large"):
        Tokenizer.from_file(tmp_path / "large.json")


@pytest.mark.parametrize("bad", [-1, 1 << 32])
def test_impossible_ids_are_refused(tokenizer: Tokenizer, bad: int) -> None:
    with pytest.raises(RequestError, match="token id"):
        tokenizer.decode([1, bad])
    with pytest.raises(RequestError, match="token id"):
        tokenizer.stream().push(bad)


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="character 2"):
        tokenizer.encode("ab\ud800")


def naive_stop(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """Looks at every beginning of the text in turn."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=3),
)
@settings(max_examples=1000, deadline=None)
@example(pieces=["ab", "abc", "x"], stops=["abcd", "bc"])
def test_stop_strings_equal_the_search_in_the_whole_text(
    pieces: list[str], stops: list[str]
) -> None:
    stopper = StopStrings(stops)
    got = ""
    for piece in pieces:
        got += stopper.push(piece)
        # Nothing is held back longer than needed.
        assert stopper.hit or not stops or len(stopper._held) < max(map(len, stops))
    got += stopper.finish()
    assert (got, stopper.hit) == naive_stop("".join(pieces), stops)
    assert stopper.push("more") == "" or stopper.hit is None


def test_text_passes_at_once_where_no_stop_string_can_begin() -> None:
    stopper = StopStrings(["</s>", "\n\n"])
    assert stopper.push("a line\n") == "a line"
    assert stopper.push("next <") == "\nnext "
    assert stopper.push("b>") == "<b>"
    assert stopper.push("end</") == "end"
    assert stopper.push("s> and more") == ""
    assert stopper.hit == "</s>"
    assert stopper.finish() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="empty"):
        StopStrings(["a", ""])
