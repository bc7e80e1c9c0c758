"""A tokenizer.model: the protocol buffer that sentencepiece writes, as far as encoding needs it.

The few fields are picked from the wire format here: the generated module of the `sentencepiece`
package runs with no version of protobuf older than its own, which would decide about the whole
environment of an export.

Source: protobuf.dev/programming-guides/encoding; sentencepiece, src/sentencepiece_model.proto.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from lorgnette.errors import CheckpointError

MAX_PIECES = 2**20
MAX_PIECE_BYTES = 512
"""Longest piece; a trainer's default is 16 characters."""

Field = int | bytes


class PieceKind(IntEnum):
    """What a piece is for."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class ModelKind(IntEnum):
    """The algorithm of a model."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its place is its id."""

    text: str
    score: float
    kind: PieceKind


@dataclass(frozen=True)
class SentencePieceModel:
    """What a tokenizer.model says about encoding; the defaults are those of the format."""

    pieces: tuple[Piece, ...]
    kind: ModelKind = ModelKind.UNIGRAM
    byte_fallback: bool = False
    treat_whitespace_as_suffix: bool = False
    charsmap: bytes = b""
    """Compiled normalisation rules, empty for none."""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    decoding_charsmap: bytes = b""


def parse_sentencepiece(content: bytes, where: object) -> SentencePieceModel:
    """Reads a tokenizer.model.

    Args:
        content: The file.
        where: Its path, for error messages.

    Raises:
        CheckpointError: It is damaged or cannot be a vocabulary.
    """
    try:
        return _parse(content)
    except (ValueError, IndexError, struct.error, TypeError) as error:
        raise CheckpointError(
            "file is not a sentencepiece model", where=where, got=error, hint="download it again"
        ) from error


def _parse(content: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    sections: dict[int, dict[int, Field]] = {2: {}, 3: {}, 5: {}}
    for number, value in _fields(content):
        if number == 1:
            pieces.append(_piece(_bytes(value)))
        elif number in sections:
            sections[number] |= dict(_fields(_bytes(value)))
    if not 1 <= len(pieces) <= MAX_PIECES:
        raise ValueError(f"{len(pieces)} pieces")
    if len({piece.text for piece in pieces}) != len(pieces):
        raise ValueError("a piece is there twice")
    trainer, normalizer, denormalizer = sections[2], sections[3], sections[5]
    return SentencePieceModel(
        pieces=tuple(pieces),
        kind=ModelKind(trainer.get(3, ModelKind.UNIGRAM)),  # type: ignore[arg-type]
        byte_fallback=bool(trainer.get(35, 0)),
        treat_whitespace_as_suffix=bool(trainer.get(24, 0)),
        charsmap=_bytes(normalizer.get(2, b"")),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
        decoding_charsmap=_bytes(denormalizer.get(2, b"")),
    )


def _piece(content: bytes) -> Piece:
    fields = dict(_fields(content))
    text = _bytes(fields.get(1, b""))
    if not 1 <= len(text) <= MAX_PIECE_BYTES:
        raise ValueError(f"a piece of {len(text)} bytes")
    (score,) = struct.unpack("<f", _bytes(fields.get(2, bytes(4))))
    if not math.isfinite(score):
        raise ValueError("a score that is not finite")
    return Piece(text.decode("utf-8"), score, PieceKind(fields.get(3, PieceKind.NORMAL)))  # type: ignore[arg-type]


def _bytes(value: Field) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number in place of a text")
    return value


def _fields(content: bytes) -> Iterator[tuple[int, Field]]:
    """The fields of a message: number, and an int or the bytes of anything else."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(content, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(content, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if size > len(content) - at:
            raise ValueError("it ends within a field")
        yield key >> 3, content[at : at + size]
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than ten bytes")
