"""Sentencepiece models for tests: trained by the library, or written piece by piece."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence

import sentencepiece

PieceRow = tuple[str, float, int]
"""Text, score, kind."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
FIRST_PIECES: tuple[PieceRow, ...] = (
    ("<unk>", 0.0, UNKNOWN),
    ("<s>", 0.0, CONTROL),
    ("</s>", 0.0, CONTROL),
    *((f"<0x{value:02X}>", 0.0, BYTE) for value in range(256)),
)
TRAINER = {3: 2, 35: 1}
"""BPE, with byte fallback."""
NORMALIZER = {3: 1, 4: 0, 5: 1}
"""A dummy prefix, spaces escaped and none removed."""

LINES = (
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What is in the image? ASSISTANT: There are 3 red circles, 12 blue squares and a sign.",
    "    def area(self):\n        return self.width * self.height  # in pixels",
    "Größe, café, naïve, смотри на картинку, 你好世界, こんにちは, 그림에 무엇이 있나요?",
    "aaaa aaaaaaaa abababab the the thethe 1234567890 3.14159 100%",
)


def train(*, split_by_unicode_script: bool, vocab_size: int = 500) -> bytes:
    """A small model with LLaMA's settings."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in LINES for _ in range(3)]),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        split_digits=True,
        split_by_unicode_script=split_by_unicode_script,
        allow_whitespace_only_pieces=True,
        character_coverage=0.98,
        minloglevel=2,
    )
    return model.getvalue()


def write_model(
    pieces: Sequence[PieceRow],
    *,
    trainer: Mapping[int, int] = TRAINER,
    normalizer: Mapping[int, int] = NORMALIZER,
    charsmap: bytes = b"",
) -> bytes:
    """A model of these pieces, its numbers by field."""
    content = b""
    for text, score, kind in pieces:
        score_field = _varint(2 << 3 | 5) + struct.pack("<f", score)
        content += _field(1, _field(1, text.encode()) + score_field + _number(3, kind))
    content += _field(2, b"".join(_number(*item) for item in trainer.items()))
    numbers = b"".join(_number(*item) for item in normalizer.items())
    return content + _field(3, _field(1, b"identity") + _field(2, charsmap) + numbers)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    content = b""
    while value > 0x7F:
        content += bytes([value & 0x7F | 0x80])
        value >>= 7
    return content + bytes([value])
