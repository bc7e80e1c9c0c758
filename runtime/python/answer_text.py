"""The text of an answer, without the header that some models write before it."""

from __future__ import annotations

from lorgnette.runtime.tokenizer import Tokenizer


class AnswerText:
    """Turns the ids of one answer into text as they come, leaving out a header at its start.

    Some models are asked without a header for their turn and write it themselves, e.g. a line
    break, `<|im_start|>assistant`, a line break, and then the answer. At the start of an answer,
    tokens of white space and then the tokens of the header are held back. Behind a whole header,
    white space is left out and all further text passes. As soon as the tokens can no longer
    become a header, everything held is text like any other. What is still undecided when the
    answer ends is left out.

    The header is told by its ids, because it may hold special tokens, which have no text.

    Args:
        tokenizer: The tokenizer of the bundle.
        header: What the model writes; empty where it writes none.
    """

    def __init__(self, tokenizer: Tokenizer, header: str) -> None:
        """Starts at the beginning of an answer."""
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream()
        self._header = tokenizer.encode(header)
        self._held: list[int] = []
        self._spaces = 0  # tokens of white space at the front of those held
        self._undecided = bool(self._header)
        self._trimming = False

    def push(self, token_id: int) -> str:
        """Takes the next id and returns the text that is now certain.

        Raises:
            RequestError: The id is negative or does not fit in 32 bits.
        """
        if not self._undecided:
            return self._trimmed(self._stream.push(token_id))
        held = self._held
        if self._spaces == len(held) and self._is_space(token_id):
            self._spaces += 1
        held.append(token_id)
        # The header may begin with white space itself, so more than one start is possible.
        starts = range(max(0, len(held) - len(self._header)), self._spaces + 1)
        if any(held[start:] == self._header for start in starts):
            self._undecided, self._trimming = False, True
            return ""
        if any(held[start:] == self._header[: len(held) - start] for start in starts):
            return ""
        self._undecided = False
        return "".join([self._stream.push(i) for i in held])

    def finish(self) -> str:
        """Returns an incomplete character as U+FFFD; an undecided beginning never comes."""
        return self._trimmed(self._stream.finish())

    def _trimmed(self, text: str) -> str:
        """The text without the white space behind a header."""
        if self._trimming:
            text = text.lstrip()
            self._trimming = not text
        return text

    def _is_space(self, token_id: int) -> bool:
        """Whether a token has a text, and that is white space."""
        if self._tokenizer.visible_token(token_id) is None:
            return False
        alone = self._tokenizer.stream()
        return not (alone.push(token_id) + alone.finish()).strip()
