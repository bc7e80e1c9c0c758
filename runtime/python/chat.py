"""A conversation over one KV cache: only what is new is prefilled."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lorgnette.errors import RequestError
from lorgnette.runtime.answer_text import AnswerText
from lorgnette.runtime.context import Context, Turn
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
from lorgnette.runtime.pictures import PictureSource, encode_pictures
from lorgnette.runtime.preprocess import Tiles, grid_for, prepare
from lorgnette.runtime.prompt import (
    ImagePart,
    Message,
    TaskPart,
    continue_prompt,
    encode_prompt,
    image_token_count,
    render_task,
)
from lorgnette.runtime.sampler import Sampler
from lorgnette.runtime.tokenizer import StopStrings

if TYPE_CHECKING:
    from lorgnette.runtime.model import Model

PREFILL_CHUNK = 1024
"""Positions of one prefill call: bounds the activations, and how long a cancel waits."""


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
        self._context = Context()
        self._filled = 0  # positions of the context whose keys and values are in the cache
        self._busy = threading.Lock()

    def send(
        self,
        prompt: str = "",
        images: Sequence[PictureSource] = (),
        request: Request | None = None,
        *,
        task: str | None = None,
    ) -> Generation:
        """Asks the next question; pictures stand before the text.

        Nothing runs until the first piece is asked for, and nothing is kept of a turn that was
        cancelled or failed before its first token.

        Args:
            prompt: The question.
            images: Pictures it is about.
            request: How the answer is generated.
            task: A fixed request of the model in place of a question; it takes one picture.

        Raises:
            RequestError: Another answer of this conversation is still being generated, or the
                task is unknown or does not go with what was given. Further errors come with the
                first piece: see `lorgnette.errors`.
        """
        if task is not None:
            self._check_task(task, prompt, len(images))
        if not self._busy.acquire(blocking=False):
            raise RequestError(
                "the conversation is still answering", hint="finish or cancel that answer first"
            )
        asked = request or Request()
        question = prompt if task is None else TaskPart(task)
        return Generation(
            lambda control: self._answer(control, question, images, asked),
            self._busy.release,
        )

    def _answer(
        self,
        control: Control,
        question: str | TaskPart,
        images: Sequence[PictureSource],
        request: Request,
    ) -> Generator[str, None, None]:
        started = time.perf_counter()
        timings = Timings()
        before = self._context
        turn: Turn | None = None
        try:
            turn = self._read_turn(control, question, images, request, timings)
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
        question: str | TaskPart,
        images: Sequence[PictureSource],
        request: Request,
        timings: Timings,
    ) -> Turn:
        """Preprocesses and encodes the pictures and sets the new context."""
        tiles = self._read_pictures(control, images, timings)
        parts = () if isinstance(question, TaskPart) else _grids(tiles)
        ids, keep = self._encode(Message("user", (*parts, question)), request)
        self._check_room(len(ids))
        started = time.perf_counter()
        model = self._model
        model.engine.expect(min(len(ids) - min(self._filled, keep), PREFILL_CHUNK))
        pictures, tiles_run = encode_pictures(model.engine, tiles, model.pictures, control.check)
        if tiles_run and not model.keep_vision:
            model.engine.release_vision()
        timings.vision = _since(started)
        image_id = model.manifest.spec.image_token_id
        old = self._context
        kept_slots = [slot for slot in old.slots if slot < keep]
        slots = kept_slots + [i for i in range(keep, len(ids)) if ids[i] == image_id]
        self._context = Context(ids, slots, [*old.pictures, *pictures])
        self._filled = min(self._filled, keep, len(ids) - 1)
        return Turn(keep, len(ids), len(ids) - self._filled, len(slots), tiles_run)

    def _read_pictures(
        self, control: Control, images: Sequence[PictureSource], timings: Timings
    ) -> list[Tiles]:
        """Tiles of all pictures, as long as there is room for their image tokens."""
        manifest = self._model.manifest
        tiles: list[Tiles] = []
        for image in images:
            control.check()
            started = time.perf_counter()
            pixels = load_image(image)
            grid = ImagePart(*grid_for(len(pixels), pixels.shape[1], manifest.preprocess))
            message = Message("user", (*_grids(tiles), grid))
            self._check_room(image_token_count(manifest.prompt, [message]))
            tiles.append(prepare(pixels, manifest.preprocess))
            timings.preprocess += _since(started)
        return tiles

    def _check_task(self, task: str, prompt: str, images: int) -> None:
        """Refuses an unknown task, and one with other than a single picture."""
        render_task(self._model.manifest.prompt, task)
        if prompt:
            raise RequestError("a task takes no prompt", where=task, got=repr(prompt))
        if images != 1:
            raise RequestError(
                "a task is about one picture", where=task, got=f"{images} pictures", wanted=1
            )

    def _check_room(self, tokens: int) -> None:
        """Refuses a prompt behind which no answer fits."""
        if tokens >= self._state.capacity:
            raise RequestError(
                "the prompt does not fit the context",
                got=f"{tokens} tokens",
                wanted=f"less than {self._state.capacity}",
                hint="ask with fewer or smaller pictures, or export with a larger --context "
                "or a smaller --max-tiles",
            )

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
        turn: Turn,
        sampler: Sampler,
        token: int,
        timings: Timings,
    ) -> Generator[str, None, None]:
        """Generates tokens until a reason to finish, yielding text as it becomes certain."""
        model, context = self._model, self._context
        answer = AnswerText(model.tokenizer, model.manifest.prompt.answer_header)
        stops, stop_ids = StopStrings(request.stop), model.manifest.prompt.stop_token_ids
        text: list[str] = []
        while True:
            context.ids.append(token)
            piece = "" if token in stop_ids else stops.push(answer.push(token))
            reason = self._finished(control, request, turn, stops)
            if piece:
                text.append(piece)
                yield piece
            if reason is not None:
                break
            step_started = time.perf_counter()
            token = sampler.next(self._step(token), context.ids)
            timings.decode += _since(step_started)
        rest = "" if reason == "stop_string" else stops.push(answer.finish()) + stops.finish()
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
        self, control: Control, request: Request, turn: Turn, stops: StopStrings
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


def _grids(tiles: Sequence[Tiles]) -> tuple[ImagePart, ...]:
    """How pictures were split, as parts of a message."""
    return tuple(ImagePart(one.rows, one.cols) for one in tiles)


def _since(started: float) -> float:
    """Milliseconds since a `perf_counter` reading."""
    return (time.perf_counter() - started) * 1e3
