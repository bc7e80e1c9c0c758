"""From logits to the next token id, defined exactly enough to repeat in another language.

Per token, in this order and in binary32 until step 4, as transformers orders its processors:

1. Repetition penalty p: for every id in the prompt or the answer so far, a negative logit is
   multiplied by p and any other divided by p, once however often the id occurred.
2. Temperature 0 ends here: the highest logit wins, the lowest id among equals. Otherwise every
   logit is divided by the temperature.
3. Top-k: ids below the k-th highest logit are out; ids equal to it all stay.
4. Weights `w = exp(logit - highest logit)` in binary64. The *order* of the ids is by falling
   logit, equal logits by rising id.
5. Top-p: with Z the sum of the weights left after step 3, an id stays while the running sum of
   the weights before it (in the order) is below p * Z. The first id always stays.
6. With u the next uniform number of `SplitMix64(seed)` and S the sum of the weights that are
   left, the answer is the first id, in the order, at which the running sum exceeds u * S (the
   last one with a weight above zero where rounding lets none exceed it).

Running sums go from left to right in the order, one addition after the other. Z and S are the last
running sum of their ids, but where those are all V ids (top-k is off; for S top-p too) they are
summed in rising id, so that V need not be sorted. A top-k of V or more is off. Only step 4's `exp`
may differ in the last bit between platforms.

Source: transformers 5.23, generation/logits_process.py (RepetitionPenaltyLogitsProcessor,
TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorgnette.errors import BundleError, RequestError
from lorgnette.runtime.rng import SplitMix64, check_seed

_FIRST_GUESS = 64
"""Candidates looked at before the set is grown; most next tokens are among far fewer."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen; the default is greedy.

    Attributes:
        temperature: 0 for greedy, otherwise 0.0001 to 10000.
        top_k: How many of the likeliest ids stay, 0 for all.
        top_p: The share of probability that stays, above 0, 1 for all.
        repetition_penalty: 0.01 to 100; 1 for none, more makes repeating less likely.
        seed: Where the random numbers start, 0 to 2**64 - 1.

    Raises:
        RequestError: A value is outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks every value."""
        _check_number("temperature", self.temperature, "0 or 0.0001 to 10000")
        if self.temperature != 0 and not 1e-4 <= self.temperature <= 1e4:
            raise _bad("temperature", self.temperature, "0 or 0.0001 to 10000")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise _bad("top_k", self.top_k, "a whole number, 0 for all")
        _check_number("top_p", self.top_p, "above 0 up to 1")
        if not 0 < self.top_p <= 1:
            raise _bad("top_p", self.top_p, "above 0 up to 1")
        _check_number("repetition_penalty", self.repetition_penalty, "0.01 to 100")
        if not 1e-2 <= self.repetition_penalty <= 100:
            raise _bad("repetition_penalty", self.repetition_penalty, "0.01 to 100")
        check_seed(self.seed)


class Sampler:
    """Chooses token after token; one sampler serves one answer.

    Args:
        params: How to choose.
        vocab_size: Length V of the logits.

    Raises:
        RequestError: `vocab_size` is not positive.
    """

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        """Seeds the random numbers and forgets every token."""
        if vocab_size < 1:
            raise RequestError("the vocabulary is empty", got=vocab_size, wanted="1 or more")
        self.params = params
        self.vocab_size = vocab_size
        self._top_k = params.top_k if params.top_k < vocab_size else 0
        self._rng = SplitMix64(params.seed)
        self._known: list[int] = []
        self._seen = np.zeros(vocab_size, dtype=np.bool_)

    def next(self, logits: NDArray[np.float32], history: Sequence[int]) -> int:
        """Chooses the id that follows `history`.

        Args:
            logits: The decoder's scores for the next token; left as they are.
            history: All ids so far, prompt and answer. Only read for the repetition penalty;
                handed over whole each time, looked at only where it grew.

        Shapes:
            logits: float32 [V].

        Raises:
            BundleError: The logits have another shape or type, or are not all finite.
            RequestError: An id of the history is outside the vocabulary.
        """
        self._check(logits)
        scores = self._penalised(logits, history)
        if self.params.temperature == 0:
            return int(np.argmax(scores))
        with np.errstate(over="ignore"):
            scores = scores / np.float32(self.params.temperature)
        self._check_finite(scores)
        ids, running, total = candidates(scores, self._top_k, self.params.top_p)
        return self._draw(scores, ids, running, total)

    def _draw(
        self,
        scores: NDArray[np.float32],
        ids: NDArray[np.int64],
        running: NDArray[np.float64],
        total: float,
    ) -> int:
        """Step 6, taking more candidates only while the drawn point lies beyond them."""
        point = self._rng.uniform() * total
        everything = self._top_k == 0 and self.params.top_p == 1
        while everything and running[-1] <= point and len(ids) < self.vocab_size:
            ids, running = _leading(scores, 8 * len(ids))
        place = int(np.searchsorted(running, point, side="right"))
        if place == len(ids):
            # Rounding only: the last id that still moved the sum.
            place = int(np.searchsorted(running, running[-1], side="left"))
        return int(ids[place])

    def _penalised(
        self, logits: NDArray[np.float32], history: Sequence[int]
    ) -> NDArray[np.float32]:
        """Step 1."""
        penalty = np.float32(self.params.repetition_penalty)
        if penalty == 1:
            return logits
        self._observe(history)
        scores = logits.copy()
        kept = scores[self._seen]
        with np.errstate(over="ignore"):
            scores[self._seen] = np.where(kept < 0, kept * penalty, kept / penalty)
        self._check_finite(scores)
        return scores

    def _observe(self, history: Sequence[int]) -> None:
        """Adds what is new in the history to the mask; starts over where it is another one."""
        ids = list(history)
        if ids[: len(self._known)] != self._known:
            self._seen[:] = False
            self._known = []
        fresh = ids[len(self._known) :]
        for token in fresh:
            if not 0 <= token < self.vocab_size:
                raise RequestError(
                    "a token id of the history is outside the vocabulary",
                    got=token,
                    wanted=f"0 to {self.vocab_size - 1}",
                )
        self._seen[fresh] = True
        self._known = ids

    def _check(self, logits: NDArray[np.float32]) -> None:
        """Refuses logits of another shape or type, and numbers that are none."""
        if logits.shape != (self.vocab_size,) or logits.dtype != np.float32:
            raise BundleError(
                "the decoder's logits have the wrong form",
                got=f"{logits.dtype} {list(logits.shape)}",
                wanted=f"float32 [{self.vocab_size}]",
            )
        self._check_finite(logits)

    def _check_finite(self, scores: NDArray[np.float32]) -> None:
        """Refuses infinities and NaN: choosing among them would hide a broken decoder."""
        bad = self.vocab_size - int(np.isfinite(scores).sum())
        if bad:
            raise BundleError(
                "the decoder's logits are not all finite",
                got=f"{bad} of {self.vocab_size} infinite or not a number",
                wanted="finite numbers",
                hint="an overflow in the decoder; run `lorgnette verify` on the bundle",
            )


def candidates(
    scores: NDArray[np.float32], top_k: int, top_p: float
) -> tuple[NDArray[np.int64], NDArray[np.float64], float]:
    """Steps 3 to 5: the ids that stay, in the order, their running sums, and the sum S.

    With `top_k` 0 and `top_p` 1 the ids are only the leading ones: the caller asks for more.

    Shapes:
        scores: float32 [V]. ids: int64 [C]. running: float64 [C].
    """
    if top_k > 0:
        ids, running = _leading(scores, top_k)
        mass = float(running[-1])
    else:
        ids, running = _leading(scores, _FIRST_GUESS)
        mass = float(np.cumsum(_weights(scores, scores.max()))[-1])
        while top_p < 1 and running[-1] < top_p * mass and len(ids) < len(scores):
            ids, running = _leading(scores, 8 * len(ids))
    if top_p == 1:
        return ids, running, mass
    count = max(1, int(np.searchsorted(running, top_p * mass, side="left")) + 1)
    return ids[:count], running[:count], float(running[min(count, len(ids)) - 1])


def _leading(
    scores: NDArray[np.float32], count: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The `count` highest scores and all equal to the last of them, in the order.

    Shapes:
        scores: float32 [V]. Returns ids int64 [C] and running sums of weights float64 [C].
    """
    if count < len(scores):
        last = np.partition(scores, len(scores) - count)[len(scores) - count]
        ids = np.flatnonzero(scores >= last)
    else:
        ids = np.arange(len(scores))
    # A stable sort of negated scores keeps rising ids among equals.
    ids = ids[np.argsort(-scores[ids], kind="stable")].astype(np.int64, copy=False)
    return ids, np.cumsum(_weights(scores[ids], scores[ids[0]]))


def _weights(scores: NDArray[np.float32], highest: np.float32) -> NDArray[np.float64]:
    """Step 4."""
    weights: NDArray[np.float64] = np.exp(scores.astype(np.float64) - np.float64(highest))
    return weights


def _check_number(name: str, value: float, wanted: str) -> None:
    """Refuses what is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _bad(name, value, wanted)


def _bad(name: str, value: object, wanted: str) -> RequestError:
    """The error for a sampling value out of range."""
    return RequestError(f"{name} is out of range", got=repr(value), wanted=wanted)
