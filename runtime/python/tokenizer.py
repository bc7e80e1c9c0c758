"""Text to token ids and back, also piece by piece while the answer is being generated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from lorgnette.errors import BundleError, RequestError
from lorgnette.runtime.text_pieces import ByteLevelPieces, LlamaPieces, Pieces, StopStrings

__all__ = ["MAX_FILE_BYTES", "StopStrings", "StreamDecoder", "Tokenizer"]

MAX_FILE_BYTES = 64 << 20
"""A larger tokenizer.json is refused; the largest in use are about a quarter of it."""

_LLAMA_DECODER = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]


class Tokenizer:
    """A tokenizer.json, loaded and checked.

    Nothing is added to what is encoded: no start token, no padding, no truncation. A string that
    is an added token becomes that token wherever it occurs, so text from users is checked first
    (see `lorgnette.runtime.prompt.encode_prompt`).

    Args:
        backend: The loaded tokenizer of the `tokenizers` library.
        where: The file it came from, for error messages.

    Raises:
        BundleError: It cannot be streamed (its decoder is neither byte-level nor LLaMA's), or
            encodes at random (BPE dropout).
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, where: object) -> None:
        """Switches off padding and truncation and checks what the runtime relies on."""
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._where = where
        self._added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
        self._skipped = frozenset(
            token.content for token in backend.get_added_tokens_decoder().values() if token.special
        )
        if getattr(backend.model, "dropout", None):
            raise BundleError("the tokenizer encodes at random", where=where, got="BPE dropout")
        self._byte_level = _is_byte_level(backend, where)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Reads a tokenizer.json.

        Raises:
            BundleError: The file is missing, too large, not JSON or not a tokenizer.
        """
        try:
            size = Path(path).stat().st_size
            if size > MAX_FILE_BYTES:
                raise BundleError(
                    "the tokenizer is too large",
                    where=path,
                    got=f"{size} bytes",
                    wanted=f"{MAX_FILE_BYTES} bytes or less",
                )
            data = Path(path).read_bytes()
        except OSError as error:
            raise BundleError(
                "the tokenizer cannot be read", where=path, got=error.strerror or error
            ) from error
        return cls.from_bytes(data, where=path)

    @classmethod
    def from_bytes(cls, data: bytes, *, where: object) -> Tokenizer:
        """Reads the contents of a tokenizer.json.

        Raises:
            BundleError: They are not JSON or not a tokenizer.
        """
        return cls(_load(data, where), where=where)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def special_strings(self) -> tuple[str, ...]:
        """The text of every added token, by rising id: what users must not be able to type."""
        return tuple(self._added[i] for i in sorted(self._added))

    @property
    def added_ids(self) -> frozenset[int]:
        """The ids of the added tokens."""
        return frozenset(self._added)

    def encode(self, text: str) -> list[int]:
        """Turns text into ids, exactly and only what stands there.

        Raises:
            RequestError: The text holds a lone surrogate and so is not Unicode text.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                "the text is not valid Unicode", got=f"a lone surrogate at character {error.start}"
            ) from error
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Turns ids into text; bytes that are no UTF-8 become U+FFFD, unknown ids nothing.

        Raises:
            RequestError: An id is negative or does not fit in 32 bits.
        """
        for token_id in ids:
            _check_id(token_id)
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token_id(self, token: str) -> int:
        """The id of a token given by its text.

        Raises:
            BundleError: There is no such token.
        """
        found: int | None = self._backend.token_to_id(token)
        if found is None:
            raise BundleError("the tokenizer lacks a token", where=self._where, wanted=repr(token))
        return found

    def normalized(self, text: str) -> str:
        """The text as the tokenizer's normaliser leaves it, where it has one."""
        if self._backend.normalizer is None:
            return text
        changed: str = self._backend.normalizer.normalize_str(text)
        return changed

    def visible_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; None where decoding leaves it out.

        Raises:
            RequestError: The id is negative or does not fit in 32 bits.
        """
        _check_id(token_id)
        token: str | None = self._backend.id_to_token(token_id)
        return None if token in self._skipped else token

    def stream(self) -> StreamDecoder:
        """Begins to decode one answer token by token."""
        return StreamDecoder(self)

    def _pieces(self) -> Pieces:
        """The incremental decoder of this tokenizer's kind."""
        return ByteLevelPieces() if self._byte_level else LlamaPieces()


class StreamDecoder:
    """Turns ids into text as they come, in constant time for each.

    The pieces joined, `finish` last, are `Tokenizer.decode` of all ids. A character whose bytes
    are spread over tokens comes with the last of them. With byte-fallback vocabularies (LLaMA) a
    run of byte tokens comes when the run ends: one later byte can make the whole run invalid.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Starts at the beginning of an answer."""
        self._tokenizer = tokenizer
        self._pieces = tokenizer._pieces()

    def push(self, token_id: int) -> str:
        """Takes the next id and returns the text that is now certain, often all of it.

        Raises:
            RequestError: The id is negative or does not fit in 32 bits.
        """
        token = self._tokenizer.visible_token(token_id)
        return "" if token is None else self._pieces.push(token)

    def finish(self) -> str:
        """Returns what was held back, incomplete characters as U+FFFD."""
        return self._pieces.finish()


def _load(data: bytes, where: object) -> tokenizers.Tokenizer:
    """Parses the file; whatever goes wrong inside the library becomes a BundleError."""
    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        # The library raises plain Exception, and a panic in it is not even an Exception.
        raise BundleError(
            "the tokenizer is damaged", where=where, got=error, wanted="a tokenizer.json"
        ) from error


def _is_byte_level(backend: tokenizers.Tokenizer, where: object) -> bool:
    """True for byte-level decoders, False for LLaMA's."""
    decoder: Any = backend.decoder and json.loads(backend.decoder.__getstate__())
    kind = decoder["type"] if decoder else "none"
    if kind == "ByteLevel":
        return True
    if kind == "Sequence" and decoder["decoders"] == _LLAMA_DECODER:
        return False
    raise BundleError(
        "the tokenizer's decoder is not supported",
        where=where,
        got=kind,
        wanted="ByteLevel, or LLaMA's sequence",
    )


def _check_id(token_id: int) -> None:
    """Refuses what cannot be a token id."""
    if not 0 <= token_id < 1 << 32:
        raise RequestError("a token id is out of range", got=token_id, wanted="0 to 2**32 - 1")
