"""Converted tokenizers, held to the libraries that their files were written for."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers

from lorgnette.errors import EXIT_WRONG_INPUT, CheckpointError
from lorgnette.export.checkpoint import Checkpoint, combine, open_files
from lorgnette.export.formats.sentencepiece import parse_sentencepiece
from lorgnette.export.tokenizer_files import (
    gguf_tokenizer_json,
    llama_tokenizer_json,
    read_tokenizer_json,
)
from lorgnette.runtime.tokenizer import Tokenizer
from tests.sentencepiece_files import (
    CONTROL,
    FIRST_PIECES,
    LINES,
    NORMAL,
    NORMALIZER,
    TRAINER,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    PieceRow,
    train,
    write_model,
)

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
LLAMA = SHARED / "tokenizers" / "llama2"
QWEN2 = SHARED / "tokenizers" / "qwen2"
needs_llama = pytest.mark.skipif(
    not LLAMA.is_dir(), reason=f"LLaMA's tokenizer may not be committed, and is not in {LLAMA}"
)
needs_qwen2 = pytest.mark.skipif(
    not QWEN2.is_dir(), reason=f"Qwen2's tokenizer is 11 MB, not committed, and not in {QWEN2}"
)
# As it stands in the published tokenizer.json of Qwen2.
PUBLISHED_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
ALPHABET = "aabdeehilnorstu  AUS.,:'!?0137\n\t\r<>/_▁éüßйк你界の한😀🦙\u0301\u200d\u00a0\x00"


def convert(model: bytes) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_buffer(
        llama_tokenizer_json(parse_sentencepiece(model, "m"), "m")
    )


def checkpoint(**files: bytes) -> Checkpoint:
    return Checkpoint(
        Path("folder"), {}, {}, {name.replace("_", "."): b for name, b in files.items()}
    )


def random_texts(pieces: Sequence[str], count: int, seed: int = 0) -> list[str]:
    """Characters at random, pieces at random, and short texts repeated."""
    draw = random.Random(seed)
    texts = []
    for i in range(count):
        if i % 3 == 0:
            parts = draw.choices(ALPHABET, k=draw.randrange(40))
        elif i % 3 == 1:
            parts = draw.choices(pieces, k=draw.randrange(12))
        else:
            parts = [draw.choice(pieces)[: draw.randrange(1, 4)] * draw.randrange(1, 30)]
        texts.append("".join(parts))
    return texts


def normal_pieces(model: bytes) -> list[str]:
    """The texts that pieces stand for."""
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(oracle.get_piece_size())
    return [
        oracle.id_to_piece(i).replace("▁", " ")
        for i in ids
        if not (oracle.is_control(i) or oracle.is_unknown(i) or oracle.is_byte(i))
    ]


def assert_equal_ids(model: bytes, texts: Sequence[str]) -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model)
    converted = convert(model)
    for text in texts:
        if not any(oracle.is_control(i) and oracle.id_to_piece(i) in text for i in range(3)):
            assert converted.encode(text).ids == oracle.encode(text), repr(text)


@cache
def trained(split_by_unicode_script: bool) -> bytes:
    return train(split_by_unicode_script=split_by_unicode_script)


@pytest.mark.parametrize("split_by_unicode_script", [True, False])
def test_a_trained_model_encodes_as_sentencepiece(split_by_unicode_script: bool) -> None:
    model = trained(split_by_unicode_script)
    pieces = normal_pieces(model)
    texts = [*LINES, "", " ", "\n", "▁", "<0x0A>", *pieces, *random_texts(pieces, 3000)]
    texts += [before + " " * n + after for n in range(40) for before in " a." for after in "\na."]
    assert_equal_ids(model, texts)


@settings(max_examples=60, deadline=None)
@given(
    alphabet=st.sampled_from(["a", "ab", "ab▁", "abc▁", "a▁"]),
    pieces=st.sets(st.text("abc▁", min_size=2, max_size=6), min_size=1, max_size=25),
    runs=st.sets(st.integers(2, 9)),
    seed=st.integers(0, 999),
)
def test_any_vocabulary_encodes_as_sentencepiece(
    alphabet: str, pieces: set[str], runs: set[int], seed: int
) -> None:
    """Splits of one piece compete here, and runs of spaces all have one score, as in LLaMA's."""
    draw = random.Random(seed)
    order = sorted(p for p in pieces if set(p) <= set(alphabet) and set(p) != {"▁"})
    draw.shuffle(order)
    rows: list[PieceRow] = [(text, -float(i), NORMAL) for i, text in enumerate(order)]
    rows += [("▁" * n, -1e9, NORMAL) for n in sorted(runs)]
    rows += [(c, -100.0 - i, NORMAL) for i, c in enumerate(sorted({*alphabet, "▁"}))]
    typed = alphabet.replace("▁", " ")
    longest = 8 if len(typed) < 3 else 5
    texts = ["".join(t) for n in range(longest) for t in itertools.product(typed, repeat=n)]
    texts += ["".join(draw.choices(typed, k=draw.randrange(40))) for _ in range(100)]
    texts += [c * n for c in typed for n in range(40)]
    assert_equal_ids(write_model([*FIRST_PIECES, *rows]), texts)


def test_each_stretch_between_special_tokens_begins_with_a_space() -> None:
    model = trained(True)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model)
    converted = convert(model)
    text = "<s>A chat</s>USER: <unk>\nWhat</s></s> x"
    wanted = [1, *oracle.encode("A chat"), 2, *oracle.encode("USER: "), 0, *oracle.encode("\nWhat")]
    assert converted.encode(text).ids == [*wanted, 2, 2, *oracle.encode(" x")]
    assert converted.encode("</s>USER").tokens[1].startswith("▁")


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The runtime's tokenizer of a small model in a directory of its own."""
    folder = tmp_path_factory.mktemp("llama")
    converted = read_tokenizer_json(checkpoint(tokenizer_model=trained(False)))
    (folder / "tokenizer.json").write_bytes(converted)
    return Tokenizer.from_file(folder / "tokenizer.json")


def streamed(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    stream = tokenizer.stream()
    return "".join([stream.push(i) for i in ids]) + stream.finish()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_runtime_streams_a_converted_model(llama_like: Tokenizer, data: st.DataObject) -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_proto=trained(False))
    text = data.draw(st.text(st.sampled_from(ALPHABET), max_size=30))
    assume(not any(special in text for special in llama_like.special_strings))
    ids = llama_like.encode(text)
    assert streamed(llama_like, ids) == text.replace("▁", " ")
    assert oracle.decode(ids) == text.replace("▁", " ")
    any_ids = data.draw(st.lists(st.integers(0, llama_like.vocab_size - 1), max_size=12))
    assert streamed(llama_like, any_ids) == llama_like.decode(any_ids)


def test_special_tokens_of_a_converted_model(llama_like: Tokenizer) -> None:
    assert llama_like.special_strings == ("<unk>", "<s>", "</s>")
    assert llama_like.vocab_size == 500
    assert streamed(llama_like, [1, *llama_like.encode("cat"), 2]) == "cat"


def test_a_tokenizer_json_comes_first() -> None:
    both = checkpoint(tokenizer_json=b"{}", tokenizer_model=b"damaged")
    assert read_tokenizer_json(both) == b"{}"


def test_conversion_is_deterministic() -> None:
    files = {"tokenizer_model": trained(True)}
    assert read_tokenizer_json(checkpoint(**files)) == read_tokenizer_json(checkpoint(**files))


def refused(read: Callable[[], object], *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read()
    assert caught.value.exit_code == EXIT_WRONG_INPUT
    told = str(caught.value)
    assert "\n" not in told
    for part in parts:
        assert part in told, told


def model_refused(model: bytes, *parts: str) -> None:
    files = checkpoint(tokenizer_model=model)
    refused(lambda: read_tokenizer_json(files), "tokenizer.model", *parts)


def test_neither_file() -> None:
    refused(lambda: read_tokenizer_json(checkpoint()), "file is missing", "tokenizer.json")


LETTERS: tuple[PieceRow, ...] = (
    *FIRST_PIECES,
    ("ab", -1.0, NORMAL),
    ("▁", -8.0, NORMAL),
    ("a", -9.0, NORMAL),
    ("b", -10.0, NORMAL),
)


def test_what_the_refusals_change_is_right_before() -> None:
    assert convert(write_model(LETTERS)).encode("ab").tokens == ["▁", "ab"]


@pytest.mark.parametrize(
    ("model", "part"),
    [
        (write_model(LETTERS, trainer=TRAINER | {3: 1}), "model type"),
        (write_model(LETTERS, trainer=TRAINER | {3: 4}), "got CHAR, wanted BPE"),
        (write_model(LETTERS, trainer={3: 2}), "byte_fallback"),
        (write_model(LETTERS, trainer=TRAINER | {24: 1}), "treat_whitespace_as_suffix"),
        (write_model(LETTERS, normalizer=NORMALIZER | {3: 0}), "add_dummy_prefix"),
        (write_model(LETTERS, normalizer=NORMALIZER | {4: 1}), "remove_extra_whitespaces"),
        (write_model(LETTERS, normalizer={}), "remove_extra_whitespaces"),
        (write_model(LETTERS, normalizer=NORMALIZER | {5: 0}), "escape_whitespaces"),
        (write_model(LETTERS, charsmap=b"rules"), "normalisation rules"),
        (write_model([*LETTERS, ("<x>", 0.0, USER_DEFINED)]), "user_defined"),
        (write_model([*LETTERS, ("x", 0.0, UNUSED)]), "unused"),
        (write_model([*LETTERS, ("<u>", 0.0, UNKNOWN)]), "not one piece for the unknown"),
        (write_model(LETTERS[1:]), "not one piece for the unknown"),
        (write_model([*LETTERS[:258], *LETTERS[259:]]), "the byte pieces"),
        (write_model([*LETTERS, ("ac", -2.0, NORMAL)]), "characters that are none"),
        (write_model([*LETTERS, ("ba", -1.0, NORMAL)]), "two pieces have one score"),
        (write_model([*LETTERS, ("ab", -3.0, NORMAL)]), "twice"),
    ],
)
def test_models_that_would_encode_otherwise_are_refused(model: bytes, part: str) -> None:
    model_refused(model, part)


def test_a_trained_unigram_model_is_refused() -> None:
    import io

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=130, minloglevel=2
    )
    model_refused(model.getvalue(), "model type", "got UNIGRAM")


def test_tokens_added_beside_the_model_are_refused() -> None:
    files = {"tokenizer.model": write_model(LETTERS), "added_tokens.json": b'{"</s>": 2}'}
    added = Checkpoint(Path("folder"), {}, {}, files)
    read_tokenizer_json(added)
    added = combine(added, {}, files={"added_tokens.json": b'{"</s>": 2, "[PAD]": 263}'})
    refused(lambda: read_tokenizer_json(added), "'[PAD]'", "added_tokens.json")


def test_further_control_pieces_are_special_tokens() -> None:
    converted = convert(write_model([*LETTERS, ("<pad>", 0.0, CONTROL)]))
    assert converted.encode("ab<pad>b").tokens == ["▁", "ab", "<pad>", "▁", "b"]


def vectors(folder: Path) -> list[tuple[str, list[int]]]:
    """Texts and the ids that they must give."""
    texts = (folder / "vectors.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (folder / "vectors.out").read_text().split("\n")
    assert len(lines) == 47  # the last is the empty text behind the last separator
    return [(t, [int(i) for i in line.split()]) for t, line in zip(texts, lines, strict=True)]


@cache
def published_llama() -> tokenizers.Tokenizer:
    return convert((LLAMA / "tokenizer.model").read_bytes())


@needs_llama
def test_llama_gives_the_published_vectors() -> None:
    for text, wanted in vectors(LLAMA):
        assert published_llama().encode(text).ids == wanted, repr(text)


@needs_llama
def test_llama_encodes_as_sentencepiece() -> None:
    model = (LLAMA / "tokenizer.model").read_bytes()
    pieces = normal_pieces(model)
    texts = random_texts(pieces, 6000) + pieces[::3]
    texts += [before + " " * n + after for n in range(99) for before in " a." for after in "\na."]
    assert_equal_ids(model, texts)


@needs_llama
def test_llama_encodes_as_another_conversion() -> None:
    other = tokenizers.Tokenizer.from_file(str(LLAMA / "tokenizer.json"))
    ours = published_llama()
    for text in random_texts([other.id_to_token(i) for i in range(32000)], 3000, seed=1):
        assert ours.encode(text).ids == other.encode(text, add_special_tokens=False).ids


@needs_llama
def test_the_prompt_of_mobilevlm_gives_the_golden_ids() -> None:
    golden = json.loads((SHARED / "golden" / "mobilevlm_omnivlm_preproc.json").read_text())
    text = "<s>" + golden["mobilevlm_prompt"].replace("<image>", "<unk>")
    wanted = [0 if i == -200 else i for i in golden["mobilevlm_ids"]]
    assert published_llama().encode(text).ids == wanted
    assert published_llama().encode("</s>USER").ids == [2, 3148, 1001]
    assert published_llama().encode("<unk>\nWhat").ids == [0, 29871, 13, 5618]


@needs_llama
def test_converting_llama_takes_seconds() -> None:
    start = time.monotonic()
    published_llama.__wrapped__()
    assert time.monotonic() - start < 10


def byte_level() -> tokenizers.Tokenizer:
    """A small tokenizer of Qwen2's kind, put together by the library."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(tokenizers.Regex(PUBLISHED_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*LINES, "e\u0301 don't I'LL\r\n\r\n   x  "] * 3, trainer)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()  # type: ignore[assignment]
    added = [("<|endoftext|>", True), ("<|im_start|>", True), ("<tool>", False)]
    for text, special in added:
        token = tokenizers.AddedToken(text, special=special, normalized=False)
        tokenizer.add_special_tokens([token]) if special else tokenizer.add_tokens([token])
    return tokenizer


def write_gguf(
    file: Path,
    source: tokenizers.Tokenizer,
    *,
    rows: int | None = None,
    padding: int = gguf.TokenType.UNUSED,
    change: Callable[[dict[str, list[str]]], object] = lambda parts: None,
    kind: str = "gpt2",
    pre: str = "qwen2",
    types: Callable[[list[int]], list[int] | None] = lambda types: types,
) -> Checkpoint:
    """The tokenizer as converters write it into a GGUF file, padded to the rows of the model."""
    size = source.get_vocab_size()
    special = {i: token.special for i, token in source.get_added_tokens_decoder().items()}
    kinds = {None: gguf.TokenType.NORMAL, True: gguf.TokenType.CONTROL}
    numbers = [int(kinds.get(special.get(i), gguf.TokenType.USER_DEFINED)) for i in range(size)]
    tokens = [source.id_to_token(i) for i in range(size)]
    for i in range(size, rows or size):
        tokens.append(f"[PAD{i}]")
        numbers.append(padding)
    merges = json.loads(source.to_str())["model"]["merges"]
    parts = {"tokens": tokens, "merges": [" ".join(merge) for merge in merges]}
    change(parts)
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(parts["tokens"])
    changed = types(numbers)
    if changed is not None:
        writer.add_token_types(changed)
    if parts["merges"]:
        writer.add_token_merges(parts["merges"])
    writer.add_tensor("token_embd.weight", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_files(file)


@pytest.mark.parametrize("padding", [gguf.TokenType.UNUSED, gguf.TokenType.USER_DEFINED])
def test_a_tokenizer_comes_back_from_gguf(tmp_path: Path, padding: int) -> None:
    source = byte_level()
    size = source.get_vocab_size()
    opened = write_gguf(tmp_path / "m.gguf", source, rows=size + 9, padding=padding)
    content = gguf_tokenizer_json(opened)
    assert content == gguf_tokenizer_json(opened)
    converted = tokenizers.Tokenizer.from_buffer(content)
    assert converted.get_vocab() == source.get_vocab()
    texts = [*LINES, "<|im_start|>user\n<tool>x<|endoftext|>", "e\u0301", f"[PAD{size}]"]
    for text in texts + random_texts(["don't", "I'LL", "\r\n", "   ", "x1", *LINES], 3000):
        ids = source.encode(text).ids
        assert converted.encode(text).ids == ids, repr(text)
        assert converted.decode(ids) == source.decode(ids)
    (tmp_path / "tokenizer.json").write_bytes(content)
    runtime = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert runtime.vocab_size == size
    assert runtime.special_strings == ("<|endoftext|>", "<|im_start|>", "<tool>")
    ids = runtime.encode("<|im_start|>Größe <tool>😀<|endoftext|>")
    assert streamed(runtime, ids) == "Größe <tool>😀" == runtime.decode(ids)


def gguf_refused(folder: Path, *parts: str, **changes: object) -> None:
    opened = write_gguf(folder / "m.gguf", byte_level(), **changes)  # type: ignore[arg-type]
    refused(lambda: gguf_tokenizer_json(opened), "m.gguf", *parts)


def test_gguf_tokenizers_of_another_kind(tmp_path: Path) -> None:
    gguf_refused(tmp_path, "'tokenizer.ggml.model'", "got llama, wanted gpt2", kind="llama")
    gguf_refused(tmp_path, "'tokenizer.ggml.pre'", "got llama-bpe, wanted qwen2", pre="llama-bpe")
    refused(lambda: gguf_tokenizer_json(Checkpoint(tmp_path, {}, {})), "no such key")


def test_gguf_tokenizers_that_do_not_fit_together(tmp_path: Path) -> None:
    def double(parts: dict[str, list[str]]) -> None:
        parts["tokens"][7] = parts["tokens"][6]

    def name_twice(parts: dict[str, list[str]]) -> None:
        parts["tokens"][-1] = parts["tokens"][6]

    def no_merges(parts: dict[str, list[str]]) -> None:
        parts["merges"].clear()

    gguf_refused(tmp_path, "merge 0 is not of tokens", change=lambda p: p["merges"].insert(0, "q"))
    gguf_refused(tmp_path, "merge 0", "'¶ q'", change=lambda p: p["merges"].insert(0, "¶ q"))
    gguf_refused(tmp_path, "merge 0", "'a b c'", change=lambda p: p["merges"].insert(0, "a b c"))
    gguf_refused(tmp_path, "token 7 is there twice", change=double)
    gguf_refused(tmp_path, "is empty or there twice", change=name_twice)
    gguf_refused(tmp_path, "merges' is missing", change=no_merges)
    gguf_refused(tmp_path, "not one type for each", types=lambda types: types[:-1])
    gguf_refused(tmp_path, "token_type' is missing", types=lambda types: None)
    gguf_refused(tmp_path, "type of token 1 is not supported", types=lambda t: [t[0], 6, *t[2:]])


def test_bytes_without_a_token_are_refused(tmp_path: Path) -> None:
    """Text with such a byte would lose it without a word."""
    source = byte_level()
    place = source.token_to_id("þ")

    def drop(types: list[int]) -> list[int]:
        types[place] = gguf.TokenType.UNUSED
        return types

    gguf_refused(tmp_path, "no token for a byte", types=drop)


@cache
def published_qwen2() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(QWEN2 / "tokenizer.json"))


@needs_qwen2
def test_qwen2_comes_back_from_gguf(tmp_path: Path) -> None:
    source = published_qwen2()
    opened = write_gguf(tmp_path / "m.gguf", source, rows=151936)
    converted = tokenizers.Tokenizer.from_buffer(gguf_tokenizer_json(opened))
    assert converted.get_vocab() == source.get_vocab()
    for text, wanted in vectors(QWEN2):
        assert converted.encode(text).ids == wanted, repr(text)
    golden = json.loads((SHARED / "golden" / "mobilevlm_omnivlm_preproc.json").read_text())
    assert converted.encode(golden["omnivlm_prompt"]).ids == golden["omnivlm_ids"]
    for text in random_texts([source.decode([i]) for i in range(0, 151643, 7)], 3000):
        assert converted.encode(text).ids == source.encode(text).ids, repr(text)
