"""A conversation over one KV cache: only what is new is prefilled."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lorgnette.errors import RequestError
from lorgnette.runtime.engines.engine import Float
from lorgnette.runtime.generation import (
    Cancelled,
    Control,
    FinishReason,
    Generation,
    Request,
    Result,
    Timings,
)
from lorgnette.runtime.image import load_image
from lorgnette.runtime.pictures import EncodedPicture, PictureSource, encode_picture
from lorgnette.runtime.preprocess import prepare
from lorgnette.runtime.prompt import ImagePart, Message, continue_prompt, encode_prompt
from lorgnette.runtime.sampler import Sampler
from lorgnette.runtime.tokenizer import StopStrings

if TYPE_CHECKING:
    from lorgnette.runtime.model import Model

PREFILL_CHUNK = 512
"""Positions of one prefill call: bounds the activations, and how long a cancel waits."""


@dataclass
class _Context:
    """What the conversation consists of; replaced as a whole when a turn begins."""

    ids: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    """Positions of image tokens, rising."""
    pictures: list[EncodedPicture] = field(default_factory=list)

    def embeddings(self, model: Model, start: int, end: int) -> Float:
        """Token embeddings of positions start .. end - 1 with image tokens spliced in."""
        embeddings = model.engine.embed(np.array(self.ids[start:end], np.int64))
        slots = np.array(self.slots, np.int64)
        first, last = np.searchsorted(slots, [start, end])
        if last > first:
            tokens = np.concatenate([picture.tokens for picture in self.pictures])
            embeddings[slots[first:last] - start] = tokens[first:last]
        return embeddings


class Chat:
    """A conversation. One answer is generated at a time.

    Args:
        model: The model that answers.
        system: A system message, where the chat template has a place for one.
    """

    def __init__(self, model: Model, system: str | None = None) -> None:
        """Starts an empty conversation with a KV cache of its own."""
        self._model = model
        self._system = system
        self._state = model.engine.new_state()
        self._context = _Context()
        self._filled = 0  # positions of the context whose keys and values are in the cache
        self._busy = threading.Lock()

    def send(
        self, prompt: str, images: Sequence[PictureSource] = (), request: Request | None = None
    ) -> Generation:
        """Asks the next question; pictures stand before the text.

        Nothing runs until the first piece is asked for, and nothing is kept of a turn that was
        cancelled or failed before its first token.

        Raises:
            RequestError: Another answer of this conversation is still being generated. Further
                errors come with the first piece: see `lorgnette.errors`.
        """
        if not self._busy.acquire(blocking=False):
            raise RequestError(
                "the conversation is still answering", hint="finish or cancel that answer first"
            )
        asked = request or Request()
        return Generation(
            lambda control: self._answer(control, prompt, images, asked),
            self._busy.release,
        )

    def _answer(
        self, control: Control, prompt: str, images: Sequence[PictureSource], request: Request
    ) -> Generator[str, None, None]:
        started = time.perf_counter()
        timings = Timings()
        before = self._context
        turn: _Turn | None = None
        try:
            turn = self._read_turn(control, prompt, images, request, timings)
            logits = self._prefill(control, timings)
            sampler = Sampler(request.sampling, self._model.manifest.spec.text.vocab_size)
            token = sampler.next(logits, self._context.ids)
        except BaseException as error:
            self._context = before
            if turn is not None:
                # Behind what the turn had kept, the cache may hold the turn that failed.
                self._filled = min(self._filled, turn.keep)
            if not isinstance(error, Cancelled):
                raise
            control.result = Result("", (), "cancelled", len(before.ids), 0, 0, 0, timings)
            return
        timings.ttft = _since(started)
        yield from self._decode(control, request, turn, sampler, token, timings)

    def _read_turn(
        self,
        control: Control,
        prompt: str,
        images: Sequence[PictureSource],
        request: Request,
        timings: Timings,
    ) -> _Turn:
        """Preprocesses and encodes the pictures and sets the new context."""
        model, manifest = self._model, self._model.manifest
        pictures: list[EncodedPicture] = []
        tiles_run = 0
        for image in images:
            control.check()
            started = time.perf_counter()
            tiles = prepare(load_image(image), manifest.preprocess)
            timings.preprocess += _since(started)
            started = time.perf_counter()
            picture, fresh = encode_picture(model.engine, tiles, model.pictures, control.check)
            tiles_run += len(tiles.pixels) if fresh else 0
            pictures.append(picture)
            timings.vision += _since(started)
        content: tuple[str | ImagePart, ...] = tuple(
            ImagePart(picture.rows, picture.cols) for picture in pictures
        )
        ids, keep = self._encode(Message("user", (*content, prompt)), request)
        if len(ids) >= self._state.capacity:
            raise RequestError(
                "the prompt does not fit the context",
                got=f"{len(ids)} tokens",
                wanted=f"less than {self._state.capacity}",
                hint="ask with fewer or smaller pictures, or export with a larger --context "
                "or a smaller --max-tiles",
            )
        image_id = manifest.spec.image_token_id
        old = self._context
        kept_slots = [slot for slot in old.slots if slot < keep]
        slots = kept_slots + [i for i in range(keep, len(ids)) if ids[i] == image_id]
        self._context = _Context(ids, slots, [*old.pictures, *pictures])
        self._filled = min(self._filled, keep, len(ids) - 1)
        return _Turn(keep, len(ids), len(ids) - self._filled, len(slots), tiles_run)

    def _encode(self, message: Message, request: Request) -> tuple[list[int], int]:
        """The ids of the whole conversation with a new turn, and how many stay as they were."""
        model, old = self._model, self._context
        special = request.allow_special_text
        if old.ids:
            spec = model.manifest.prompt
            further = continue_prompt(
                spec, model.tokenizer, old.ids, [message], allow_special_text=special
            )
            return further.ids, further.keep
        messages = [message]
        if self._system is not None:
            messages.insert(0, Message("system", (self._system,)))
        ids = encode_prompt(
            model.manifest.prompt, model.tokenizer, messages, allow_special_text=special
        )
        return ids, 0

    def _prefill(self, control: Control, timings: Timings) -> Float:
        """Runs what the cache lacks; returns the logits behind the last position."""
        started = time.perf_counter()
        context = self._context
        while True:
            control.check()
            end = min(self._filled + PREFILL_CHUNK, len(context.ids))
            embeddings = context.embeddings(self._model, self._filled, end)
            logits = self._state.run(embeddings, self._filled)
            self._filled = end
            if end == len(context.ids):
                timings.prefill = _since(started)
                return logits

    def _decode(
        self,
        control: Control,
        request: Request,
        turn: _Turn,
        sampler: Sampler,
        token: int,
        timings: Timings,
    ) -> Generator[str, None, None]:
        """Generates tokens until a reason to finish, yielding text as it becomes certain."""
        model, context = self._model, self._context
        stream, stops = model.tokenizer.stream(), StopStrings(request.stop)
        stop_ids = model.manifest.prompt.stop_token_ids
        text: list[str] = []
        while True:
            context.ids.append(token)
            piece = "" if token in stop_ids else stops.push(stream.push(token))
            reason = self._finished(control, request, turn, stops)
            if piece:
                text.append(piece)
                yield piece
            if reason is not None:
                break
            step_started = time.perf_counter()
            token = sampler.next(self._step(token), context.ids)
            timings.decode += _since(step_started)
        rest = "" if reason == "stop_string" else stops.push(stream.finish()) + stops.finish()
        if rest:
            text.append(rest)
            yield rest
        control.result = Result(
            text="".join(text),
            token_ids=tuple(context.ids[turn.prompt_tokens :]),
            finish_reason=reason,
            prompt_tokens=turn.prompt_tokens,
            prefilled_tokens=turn.prefilled_tokens,
            image_tokens=turn.image_tokens,
            tiles=turn.tiles,
            timings=timings,
        )

    def _finished(
        self, control: Control, request: Request, turn: _Turn, stops: StopStrings
    ) -> FinishReason | None:
        """Why the answer ends behind the token just taken, None where it goes on."""
        if self._context.ids[-1] in self._model.manifest.prompt.stop_token_ids:
            return "stop"
        if stops.hit is not None:
            return "stop_string"
        if control.cancelled.is_set():
            return "cancelled"
        if len(self._context.ids) - turn.prompt_tokens >= request.max_new_tokens:
            return "length"
        if len(self._context.ids) > self._state.capacity:
            return "context_full"
        return None

    def _step(self, token: int) -> Float:
        """Feeds one token; returns the logits behind it."""
        embeddings = self._model.engine.embed(np.array([token], np.int64))
        logits = self._state.run(embeddings, self._filled)
        self._filled += 1
        return logits


@dataclass(frozen=True)
class _Turn:
    """Counts of a turn, known before the first token.

    Attributes:
        keep: Positions at the front that are as they were before the turn.
        prompt_tokens: As in `Result`, like the others.
    """

    keep: int
    prompt_tokens: int
    prefilled_tokens: int
    image_tokens: int
    tiles: int


def _since(started: float) -> float:
    """Milliseconds since a `perf_counter` reading."""
    return (time.perf_counter() - started) * 1e3
