"""Small tokenizers trained on the zoo's own sentences: byte-level BPE and sentencepiece."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from tests.zoo.draw import COLOURS, SHAPES
from tests.zoo.questions import NUMBERS, PHRASES, phrase, plural

QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 cuts text before merging, as published in its tokenizer.json."""


class Tokens(Protocol):
    """What training and evaluation need of a tokenizer."""

    @property
    def size(self) -> int:
        """Number of ids."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text on its own; special tokens are recognised where the kind can."""

    def decode(self, ids: list[int]) -> str:
        """The text without special tokens."""

    def piece_id(self, piece: str) -> int:
        """The id of one piece that exists."""

    def texts(self) -> list[str]:
        """What each id writes; special tokens and lone bytes by their name."""

    def save(self, folder: Path) -> None:
        """Write the published file into a checkpoint."""


class ByteLevel:
    """A byte-level BPE tokenizer, published as `tokenizer.json`."""

    def __init__(self, inner: Tokenizer) -> None:
        """Wrap a tokenizer of the tokenizers library."""
        self.inner = inner

    @classmethod
    def load(cls, folder: Path) -> ByteLevel:
        """The tokenizer of a checkpoint."""
        return cls(Tokenizer.from_file(str(folder / "tokenizer.json")))

    @property
    def size(self) -> int:
        """Number of ids."""
        return int(self.inner.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """The ids of a text, special tokens among them."""
        return list(self.inner.encode(text).ids)

    def decode(self, ids: list[int]) -> str:
        """The text without special tokens."""
        return str(self.inner.decode(ids, skip_special_tokens=True))

    def piece_id(self, piece: str) -> int:
        """The id of one piece that exists."""
        found = self.inner.token_to_id(piece)
        if found is None:
            raise KeyError(f"zoo: tokenizer: got {piece!r}, wanted a piece of it")
        return int(found)

    def texts(self) -> list[str]:
        """What each id writes; a byte that is no character of its own by its piece."""
        written = [self.inner.decode([i], skip_special_tokens=False) for i in range(self.size)]
        pieces = [str(self.inner.id_to_token(i)) for i in range(self.size)]
        return [p if "�" in w else w for w, p in zip(written, pieces, strict=True)]

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`."""
        self.inner.save(str(folder / "tokenizer.json"))


class SentencePiece:
    """A sentencepiece BPE tokenizer of LLaMA's kind, published as `tokenizer.model`."""

    def __init__(self, proto: bytes) -> None:
        """Wrap the content of a model file."""
        self.proto = proto
        self.inner = sentencepiece.SentencePieceProcessor(model_proto=proto)

    @classmethod
    def load(cls, folder: Path) -> SentencePiece:
        """The tokenizer of a checkpoint."""
        return cls((folder / "tokenizer.model").read_bytes())

    @property
    def size(self) -> int:
        """Number of ids."""
        return int(self.inner.GetPieceSize())

    def encode(self, text: str) -> list[int]:
        """The ids of a text behind its own dummy prefix, without `<s>`."""
        return list(self.inner.EncodeAsIds(text))

    def decode(self, ids: list[int]) -> str:
        """The text without special tokens."""
        return str(self.inner.DecodeIds(ids))

    def piece_id(self, piece: str) -> int:
        """The id of one piece that exists."""
        return int(self.inner.PieceToId(piece))

    def texts(self) -> list[str]:
        """What each id writes; an ASCII byte as its character, other bytes by their piece."""
        found = []
        for i in range(self.size):
            piece = str(self.inner.IdToPiece(i)).replace("\u2581", " ")
            if self.inner.IsByte(i) and int(piece[3:5], 16) < 128:
                piece = chr(int(piece[3:5], 16))
            found.append(piece)
        return found

    def save(self, folder: Path) -> None:
        """Write `tokenizer.model`."""
        (folder / "tokenizer.model").write_bytes(self.proto)


def train_byte_level(
    sentences: Iterable[str], pieces: int, firsts: Iterable[str], added: list[str], *, qwen: bool
) -> ByteLevel:
    """Train one; the same sentences always give the same ids.

    Args:
        sentences: What to train on.
        pieces: Most ids before the added tokens: the 256 bytes, `firsts` and the merges.
        firsts: Special tokens with the first ids.
        added: Special tokens behind the merges. The last keeps the last id, and reserved ones
            before it bring the vocabulary to a multiple of 32.
        qwen: Cut text as Qwen2 does, and normalise; otherwise as SmolLM2.
    """
    tokenizer = Tokenizer(models.BPE())
    if qwen:
        tokenizer.normalizer = normalizers.NFC()
        first: pre_tokenizers.PreTokenizer = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
    else:
        first = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not qwen)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        special_tokens=list(firsts),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    spare = -(tokenizer.get_vocab_size() + len(added)) % 32
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(spare)]
    names = [*added[:-1], *reserved, *added[-1:]]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in names])
    return ByteLevel(tokenizer)


def train_sentencepiece(sentences: Iterable[str], pieces: int) -> SentencePiece:
    """Train one with the settings of LLaMA's; the same sentences always give the same ids."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=pieces,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        unk_surface=" \u2047 ",
        num_threads=1,
        minloglevel=2,
    )
    return SentencePiece(model.getvalue())


def sentences(space: str = " ") -> Iterator[str]:
    """Every phrase with every subject, and each answer with `space` before it.

    Rendered text is left out on purpose, so that its characters never merge with each other.
    """
    adjectives, nouns = list(COLOURS), [*SHAPES, "shape", "text", "thing"]
    for noun in nouns:
        for subject in [noun, *(f"{adjective} {noun}" for adjective in adjectives)]:
            for kind in ("colour", "position", "exists"):
                yield from (phrase(kind, i, subject) for i in range(len(PHRASES[kind])))
            yield from (phrase("count", i, plural(subject)) for i in range(len(PHRASES["count"])))
        yield f"{space}{noun.capitalize()}."
    for adjective in adjectives:
        yield from (phrase("shape", i, adjective) for i in range(len(PHRASES["shape"])))
        yield f"{space}{adjective.capitalize()}."
    yield from (f"{space}{number}" for number in NUMBERS)
    yield from PHRASES["read"]
    yield from (f"{space}{word}." for word in ("Yes", "No", "Left", "Right", "Top", "Bottom"))
