"""One answer while it is being generated: an iterator over pieces of text."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Generator as GeneratorType
from dataclasses import dataclass
from typing import Literal

from lorgnette.errors import RequestError
from lorgnette.runtime.sampler import SamplingParams
from lorgnette.runtime.tokenizer import StopStrings

GREEDY = SamplingParams()

FinishReason = Literal["stop", "stop_string", "length", "context_full", "cancelled"]


@dataclass(frozen=True, slots=True)
class Request:
    """How an answer is generated.

    Attributes:
        max_new_tokens: The most tokens of the answer, 1 or more.
        sampling: How each token is chosen.
        stop: Strings that end the answer and are not part of it.
        allow_special_text: Lets the prompt hold the text of special tokens.

    Raises:
        RequestError: The length is not a positive whole number, or a stop string is empty.
    """

    max_new_tokens: int = 256
    sampling: SamplingParams = GREEDY
    stop: tuple[str, ...] = ()
    allow_special_text: bool = False

    def __post_init__(self) -> None:
        """Checks the length and the stop strings."""
        length = self.max_new_tokens
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise RequestError(
                "max_new_tokens is out of range",
                got=repr(length),
                wanted="a whole number, 1 or more",
            )
        StopStrings(self.stop)


@dataclass
class Timings:
    """Where the time of one answer went, in milliseconds."""

    preprocess: float = 0.0
    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    """Of the tokens behind the first, without what the reader of the pieces took."""
    ttft: float = 0.0
    """From the call to the first token: preprocess, vision, prefill and what lies between."""


@dataclass(frozen=True)
class Result:
    """A finished answer.

    Attributes:
        text: The answer, without stop token or stop string.
        token_ids: Every generated token, the stop token included.
        finish_reason: `stop` (a stop token), `stop_string`, `length` (max_new_tokens),
            `context_full` (the KV cache has no room left) or `cancelled`.
        prompt_tokens: Tokens of the whole context before the answer, image tokens included.
        prefilled_tokens: How many of them were new to the KV cache.
        image_tokens: How many of the context's tokens are image tokens.
        tiles: Tiles that the vision encoder ran on for this answer.
        timings: Where the time went.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    prefilled_tokens: int
    image_tokens: int
    tiles: int
    timings: Timings

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens a second after the first; 0 where there was no second."""
        steps = len(self.token_ids) - 1
        return steps / self.timings.decode * 1e3 if steps > 0 and self.timings.decode else 0.0


class Cancelled(Exception):  # a signal, not an error
    """Raised inside a generation to leave it."""


class Control:
    """What an answer and the one who reads it tell each other.

    Apart from `Generation`, because the producer holds it: an object that is part of no reference
    cycle is freed the moment it is dropped.
    """

    def __init__(self) -> None:
        """Starts uncancelled and without a result."""
        self.cancelled = threading.Event()
        self.result: Result | None = None

    def check(self) -> None:
        """Raises `Cancelled` if the answer was cancelled."""
        if self.cancelled.is_set():
            raise Cancelled


class Generation(Iterator[str]):
    """Yields the answer piece by piece; each piece is whole characters of valid text.

    A generation that is dropped half-way keeps what was generated so far in its chat.
    """

    def __init__(
        self,
        produce: Callable[[Control], GeneratorType[str, None, None]],
        release: Callable[[], None],
    ) -> None:
        """Takes the producer; nothing runs until the first piece is asked for."""
        self._control = Control()
        self._pieces = produce(self._control)
        self._release = release

    def __iter__(self) -> Generation:
        """Returns itself."""
        return self

    def __next__(self) -> str:
        """The next piece of text.

        Raises:
            StopIteration: The answer is finished; `result()` has the rest.
        """
        try:
            return next(self._pieces)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stops generating here and frees the conversation for the next question."""
        self._pieces.close()
        release, self._release = self._release, _nothing
        release()

    def __del__(self) -> None:
        """Frees the conversation when an answer is dropped half-way."""
        self.close()

    def cancel(self) -> None:
        """Ends the answer at the next token; may be called from any thread, and again."""
        self._control.cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._control.cancelled.is_set()

    def result(self) -> Result:
        """The finished answer; generates what has not been asked for yet.

        Raises:
            RequestError: The generation was closed or ended with an error before.
        """
        for _ in self:
            pass
        if self._control.result is None:
            raise RequestError(
                "the answer was not finished", hint="it was closed or ended with an error"
            )
        return self._control.result


def _nothing() -> None:
    """What a second release does."""


def peak_rss_bytes() -> int | None:
    """The largest resident set of this process so far, None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def as_tuple(value: str | Sequence[str]) -> tuple[str, ...]:
    """One string or several, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)
