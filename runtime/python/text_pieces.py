"""Text that comes in pieces: bytes spread over tokens, stop strings spread over pieces."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Protocol

from lorgnette.errors import RequestError

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class StopStrings:
    """Ends an answer at the first stop string, however the text is cut into pieces.

    The text is searched character by character: it ends as soon as some stop string is complete,
    the longest where several end at once, and the stop string is not part of the answer. What
    could be the beginning of a stop string is held back until it is decided.

    Args:
        stops: The stop strings; none means that all text passes.

    Raises:
        RequestError: A stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Starts with nothing held back."""
        if "" in stops:
            raise RequestError("a stop string is empty", wanted="one character or more")
        self._stops = tuple(stops)
        self._longest = max((len(stop) for stop in stops), default=0)
        self._held = ""
        self.hit: str | None = None
        """The stop string that was found; from then on no more text comes."""

    def push(self, piece: str) -> str:
        """Takes the next text and returns what certainly belongs to the answer."""
        if self.hit is not None:
            return ""
        text = self._held + piece
        found = [(text.find(s) + len(s), -len(s), s) for s in self._stops if s in text]
        if found:
            end, negative_length, self.hit = min(found)
            self._held = ""
            return text[: end + negative_length]
        keep = self._open_length(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Returns what was held back: the answer ended without completing a stop string."""
        held, self._held = self._held, ""
        return held

    def _open_length(self, text: str) -> int:
        """Length of the longest end of the text that a stop string could begin with."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


class Pieces(Protocol):
    """Decodes the tokens that are not skipped, one by one."""

    def push(self, token: str) -> str:
        """Takes a token as the vocabulary spells it and returns the text now certain."""

    def finish(self) -> str:
        """Returns what was held back."""


class ByteLevelPieces:
    """GPT-2's way: every character of a token stands for one byte."""

    def __init__(self) -> None:
        """Starts between characters."""
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: str) -> str:
        """Returns the characters that this token completes."""
        try:
            data = bytes([_BYTE_OF[character] for character in token])
        except KeyError:
            # An added token may hold characters outside the byte alphabet: it stands for itself.
            data = token.encode("utf-8")
        return self._utf8.decode(data)

    def finish(self) -> str:
        """Returns U+FFFD where a character is incomplete."""
        return self._utf8.decode(b"", final=True)


class LlamaPieces:
    """SentencePiece with byte fallback: `▁` is a space, and the very first space is dropped."""

    def __init__(self) -> None:
        """Starts before the first space."""
        self._run = bytearray()
        self._at_start = True

    def push(self, token: str) -> str:
        """Returns nothing within a run of byte tokens, else the run and the token."""
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte:
            self._run.append(int(byte[1], 16))
            return ""
        return self._without_first_space(self._end_of_run() + token.replace("▁", " "))

    def finish(self) -> str:
        """Returns the last run of byte tokens."""
        return self._without_first_space(self._end_of_run())

    def _end_of_run(self) -> str:
        """The bytes so far: text where all of them are UTF-8, else U+FFFD for each."""
        data, self._run = bytes(self._run), bytearray()
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" * len(data)

    def _without_first_space(self, text: str) -> str:
        if not self._at_start or not text:
            return text
        self._at_start = False
        return text.removeprefix(" ")


def _byte_alphabet() -> dict[str, int]:
    """Which byte a character of a byte-level token stands for.

    Printable Latin-1 stands for itself, the other bytes for U+0100 onwards.
    Source: GPT-2's byte encoder, as the `tokenizers` library has it.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()
