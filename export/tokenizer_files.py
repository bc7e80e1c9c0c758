"""tokenizer.json for checkpoints that are published without one.

The result is in the form that `lorgnette.runtime.tokenizer` runs, and encodes as the original.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from lorgnette.errors import CheckpointError
from lorgnette.export.checkpoint import Checkpoint
from lorgnette.export.formats.sentencepiece import (
    ModelKind,
    Piece,
    PieceKind,
    SentencePieceModel,
    parse_sentencepiece,
)

TOKENIZER_JSON = "tokenizer.json"
SENTENCEPIECE = "tokenizer.model"
SPACE = "\u2581"
BYTE_PIECES = frozenset(f"<0x{value:02X}>" for value in range(256))

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Source: Qwen2 as published, tokenizer.json; llama.cpp's pre-tokenizer `qwen2`."""
NORMAL_TOKEN, CONTROL_TOKEN, USER_TOKEN, UNUSED_TOKEN = 1, 3, 4, 5
"""GGUF's kinds of tokens, as far as a byte-level vocabulary has them."""

Json = dict[str, Any]


def read_tokenizer_json(checkpoint: Checkpoint) -> bytes:
    """The tokenizer.json of a checkpoint, converted from tokenizer.model where there is none.

    Raises:
        CheckpointError: There is neither, or the model is damaged or of a kind that tokenizer.json
            would encode otherwise.
    """
    content = checkpoint.data(TOKENIZER_JSON)
    if content is not None:
        return content
    content = checkpoint.data(SENTENCEPIECE)
    where = checkpoint.path / SENTENCEPIECE
    if content is None:
        raise CheckpointError(
            "file is missing",
            where=checkpoint.path / TOKENIZER_JSON,
            hint=f"or {SENTENCEPIECE} in its place",
        )
    model = parse_sentencepiece(content, where)
    _check_added_tokens(checkpoint, model)
    return llama_tokenizer_json(model, where)


def llama_tokenizer_json(model: SentencePieceModel, where: object) -> bytes:
    """LLaMA's legacy behaviour as a tokenizer.json.

    Each stretch of text between added tokens begins with a space of its own, which is what the
    legacy slow tokenizers do.

    Args:
        model: A BPE model with byte fallback that changes nothing but spaces.
        where: Its file, for error messages.

    Raises:
        CheckpointError: The model would encode otherwise than the result.
    """
    _check_llama_settings(model, where)
    _check_llama_pieces(model.pieces, where)
    unknown = next(piece.text for piece in model.pieces if piece.kind == PieceKind.UNKNOWN)
    return _dump(
        added=[
            _added_token(i, piece.text, special=True)
            for i, piece in enumerate(model.pieces)
            if piece.kind in (PieceKind.UNKNOWN, PieceKind.CONTROL)
        ],
        normalizer={
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        pre_tokenizer=None,
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        vocab={piece.text: i for i, piece in enumerate(model.pieces)},
        merges=merges_from_scores(model.pieces),
        unknown=unknown,
    )


def merges_from_scores(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """The merges of a BPE model that stores a score for each piece instead.

    Sentencepiece joins the pair whose whole has the best score, the leftmost of equals. A list of
    merges has one rank for each split of a piece, so every split stands in it. Where splits
    compete, in runs of one character, leftmost first lets the left part grow: the longest left
    part comes first. That also holds between pieces of one score, as LLaMA's runs of spaces are.

    Args:
        pieces: The vocabulary. Every character of a normal piece is a piece.
    """
    normal = {piece.text: piece.score for piece in pieces if piece.kind == PieceKind.NORMAL}
    found = [
        (-score, -cut, cut - len(text), text[:cut], text[cut:])
        for text, score in normal.items()
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def gguf_tokenizer_json(checkpoint: Checkpoint) -> bytes:
    """The tokenizer of a GGUF file with Qwen2's byte-level BPE.

    Args:
        checkpoint: A GGUF file as it was opened.

    Raises:
        CheckpointError: The tokenizer is of another kind, or its parts do not fit.
    """
    where = checkpoint.path
    for key, wanted in (("tokenizer.ggml.model", "gpt2"), ("tokenizer.ggml.pre", "qwen2")):
        if checkpoint.config.get(key) != wanted:
            raise CheckpointError(
                f"'{key}' is not supported",
                where=where,
                got=checkpoint.config.get(key, "no such key"),
                wanted=wanted,
            )
    tokens: list[str] = _array(checkpoint, "tokenizer.ggml.tokens", str)
    kinds: list[int] = _array(checkpoint, "tokenizer.ggml.token_type", int)
    if len(kinds) != len(tokens):
        raise CheckpointError(
            "the tokenizer has not one type for each token",
            where=where,
            got=len(kinds),
            wanted=len(tokens),
        )
    vocab, added = _gguf_vocabulary(tokens, kinds, where)
    _check_added(added, vocab, where)
    if not vocab.keys() >= set(ByteLevel.alphabet()):
        raise CheckpointError("the tokenizer has no token for a byte", where=where)
    merges = _split_merges(_array(checkpoint, "tokenizer.ggml.merges", str), vocab, where)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return _dump(
        added=added,
        normalizer={"type": "NFC"},
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": QWEN2_SPLIT},
                    "behavior": "Isolated",
                    "invert": False,
                },
                byte_level | {"use_regex": False},
            ],
        },
        decoder=byte_level | {"use_regex": False},
        vocab=vocab,
        merges=merges,
        unknown=None,
    )


def _gguf_vocabulary(
    tokens: Sequence[str], kinds: Sequence[int], where: object
) -> tuple[dict[str, int], list[Json]]:
    """The tokens that merges make with their ids, and the added ones."""
    vocab: dict[str, int] = {}
    added: list[Json] = []
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind == UNUSED_TOKEN or token == f"[PAD{i}]":
            continue  # rows of the embedding without a token; some writers call them user-defined
        if kind not in (NORMAL_TOKEN, CONTROL_TOKEN, USER_TOKEN):
            raise CheckpointError(f"type of token {i} is not supported", where=where, got=kind)
        if kind != NORMAL_TOKEN:
            added.append(_added_token(i, token, special=kind == CONTROL_TOKEN))
        elif token in vocab:
            raise CheckpointError(f"token {i} is there twice", where=where, got=repr(token))
        else:
            vocab[token] = i
    return vocab, added


def _dump(
    *,
    added: Sequence[Json],
    normalizer: Json,
    pre_tokenizer: Json | None,
    decoder: Json,
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    unknown: str | None,
) -> bytes:
    """A tokenizer.json around a BPE model; with `unknown` it falls back to bytes."""
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": unknown is not None,
            "byte_fallback": unknown is not None,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
    return json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def _added_token(token_id: int, text: str, *, special: bool) -> Json:
    return {
        "id": token_id,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def _check_llama_settings(model: SentencePieceModel, where: object) -> None:
    for name, got, wanted in (
        ("model type", model.kind.name, ModelKind.BPE.name),
        ("byte_fallback", model.byte_fallback, True),
        ("add_dummy_prefix", model.add_dummy_prefix, True),
        ("remove_extra_whitespaces", model.remove_extra_whitespaces, False),
        ("escape_whitespaces", model.escape_whitespaces, True),
        ("treat_whitespace_as_suffix", model.treat_whitespace_as_suffix, False),
        ("normalisation rules", f"{len(model.charsmap)} bytes", "0 bytes"),
        ("denormalisation rules", f"{len(model.decoding_charsmap)} bytes", "0 bytes"),
    ):
        if got != wanted:
            raise CheckpointError(
                f"{name} of the sentencepiece model is not supported",
                where=where,
                got=got,
                wanted=wanted,
                hint="a tokenizer.json beside it would be used instead",
            )


def _check_llama_pieces(pieces: Sequence[Piece], where: object) -> None:
    """Refuses vocabularies for which a list of merges would encode otherwise."""
    kinds = [piece.kind for piece in pieces]
    for kind in (PieceKind.USER_DEFINED, PieceKind.UNUSED):
        if kind in kinds:
            text = pieces[kinds.index(kind)].text
            raise CheckpointError(f"a piece is {kind.name.lower()}", where=where, got=repr(text))
    if kinds.count(PieceKind.UNKNOWN) != 1:
        raise CheckpointError("there is not one piece for the unknown", where=where)
    if {piece.text for piece in pieces if piece.kind == PieceKind.BYTE} != BYTE_PIECES:
        raise CheckpointError(
            "the byte pieces are not '<0x00>' to '<0xFF>'",
            where=where,
            got=f"{kinds.count(PieceKind.BYTE)} of them",
        )
    normal = {piece.text for piece in pieces if piece.kind == PieceKind.NORMAL}
    scores: dict[float, str] = {}
    for piece in pieces:
        if piece.kind != PieceKind.NORMAL or len(piece.text) == 1:
            continue
        if not normal.issuperset(piece.text):
            raise CheckpointError(
                "a piece has characters that are none", where=where, got=repr(piece.text)
            )
        other = scores.setdefault(piece.score, piece.text)
        if other != piece.text and set(other + piece.text) != {SPACE}:
            raise CheckpointError(
                "two pieces have one score",
                where=where,
                got=f"{other!r} and {piece.text!r}",
                wanted="an order of all merges",
            )


def _check_added_tokens(checkpoint: Checkpoint, model: SentencePieceModel) -> None:
    """Refuses tokens that were added beside the model: they would be missing from the result."""
    added = checkpoint.json("added_tokens.json") or {}
    ids = {piece.text: i for i, piece in enumerate(model.pieces)}
    for text, token_id in added.items():
        if ids.get(text) != token_id:
            raise CheckpointError(
                f"added token {text!r} is not in {SENTENCEPIECE}",
                where=checkpoint.path / "added_tokens.json",
                hint=f"add a {TOKENIZER_JSON} to the checkpoint",
            )


def _array(checkpoint: Checkpoint, key: str, kind: type) -> list[Any]:
    values = checkpoint.array(key)
    if values is None:
        raise CheckpointError(f"'{key}' is missing", where=checkpoint.path)
    if not all(isinstance(value, kind) for value in values):
        raise CheckpointError(f"'{key}' does not hold {kind.__name__}", where=checkpoint.path)
    return list(values)


def _check_added(added: Sequence[Json], vocab: Mapping[str, int], where: object) -> None:
    seen: set[str] = set()
    for token in added:
        text = token["content"]
        if not text or text in seen or text in vocab:
            raise CheckpointError(
                f"token {token['id']} is empty or there twice", where=where, got=repr(text)
            )
        seen.add(text)


def _split_merges(
    merges: Sequence[str], vocab: Mapping[str, int], where: object
) -> list[tuple[str, str]]:
    """Both parts of each merge, which must be tokens and make one."""
    result = []
    for i, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise CheckpointError(f"merge {i} is not of tokens", where=where, got=repr(merge[:80]))
        result.append((left, right))
    return result
