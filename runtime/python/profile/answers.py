"""How long a person waits for the first word, through the public interface."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from lorgnette.errors import ProfileError, RequestError
from lorgnette.runtime.generation import Request, Result
from lorgnette.runtime.model import Model
from lorgnette.runtime.profile.bench import Bench
from lorgnette.runtime.profile.document import Answer
from lorgnette.runtime.profile.picture import (
    FreshPictures,
    one_tile,
    tile_count,
    with_preprocess,
)
from lorgnette.runtime.profile.stats import figure, unknown

QUESTION = "Describe this picture."
SECOND_QUESTION = "What stands out most?"
ONE_TOKEN = Request(max_new_tokens=1)
PARTS = ("preprocess", "vision", "prefill")
"""Fields of `Timings` that a first token's time consists of."""
ONE_TILE_ONLY = "the bundle makes one tile of every picture"


@dataclass
class _Turns:
    """What the runs took, in milliseconds."""

    ttft: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PARTS})
    rest: list[float] = field(default_factory=list)
    second: list[float] = field(default_factory=list)
    second_reason: str = ""
    prompt_tokens: int = 0


def measure_answers(model: Model, bench: Bench, pictures: FreshPictures) -> dict[str, Answer]:
    """First tokens about a picture of one tile, and about one in all its tiles.

    Args:
        model: The model.
        bench: Repeats the runs.
        pictures: Gives each run its picture.
    """
    spec = model.manifest.preprocess
    tiles = tile_count(pictures, spec)
    single = with_preprocess(model, one_tile(spec))
    found = {"one_tile": measure_answer(single, bench, pictures, 1, "first token, one tile")}
    if tiles == 1:
        found["full_tiling"] = no_answer(ONE_TILE_ONLY, None)
    else:
        name = f"first token, {tiles} tiles"
        found["full_tiling"] = measure_answer(model, bench, pictures, tiles, name)
    return found


def measure_answer(
    model: Model, bench: Bench, pictures: FreshPictures, tiles: int, name: str
) -> Answer:
    """The first token about a fresh picture, then that of a second turn of the same conversation.

    Args:
        model: The model.
        bench: Repeats the runs.
        pictures: Gives each run its picture.
        tiles: As many as the picture must become.
        name: Told as progress.
    """
    turns = _Turns()

    def run() -> float:
        picture = pictures.take()
        started = time.perf_counter()
        chat = model.chat()  # as `Model.generate` does; its KV cache is part of the wait
        first = chat.send(QUESTION, [picture], ONE_TOKEN).result()
        ttft = _since(started)
        _check_fresh(first, tiles)
        _note(turns, first, ttft)
        if not turns.second_reason:
            try:
                started = time.perf_counter()
                chat.send(SECOND_QUESTION, [], ONE_TOKEN).result()
                turns.second.append(_since(started))
            except RequestError as error:  # no room for another turn
                turns.second_reason = str(error)
        return ttft

    try:
        kept = len(bench.samples(name, run))
    except RequestError as error:  # the prompt does not fit the context
        return no_answer(str(error), tiles)
    return Answer(
        tiles=tiles,
        prompt_tokens=turns.prompt_tokens,
        ttft_ms=figure(turns.ttft[-kept:]),
        preprocess_ms=figure(turns.parts["preprocess"][-kept:]),
        vision_ms=figure(turns.parts["vision"][-kept:]),
        prefill_ms=figure(turns.parts["prefill"][-kept:]),
        rest_ms=figure(turns.rest[-kept:]),
        second_turn_ms=unknown(turns.second_reason)
        if turns.second_reason
        else figure(turns.second[-kept:]),
    )


def no_answer(reason: str, tiles: int | None) -> Answer:
    """An answer that could not be measured."""
    none = unknown(reason)
    return Answer(
        tiles=tiles,
        prompt_tokens=None,
        ttft_ms=none,
        preprocess_ms=none,
        vision_ms=none,
        prefill_ms=none,
        rest_ms=none,
        second_turn_ms=none,
        reason=reason,
    )


def _note(turns: _Turns, result: Result, ttft: float) -> None:
    timings = result.timings
    parts = {name: float(getattr(timings, name)) for name in PARTS}
    for name, value in parts.items():
        turns.parts[name].append(value)
    turns.ttft.append(ttft)
    # Parts may run side by side one day: what is left is never less than nothing.
    turns.rest.append(max(ttft - sum(parts.values()), 0.0))
    turns.prompt_tokens = result.prompt_tokens


def _since(started: float) -> float:
    """Milliseconds since a reading of the clock."""
    return (time.perf_counter() - started) * 1e3


def _check_fresh(result: Result, tiles: int) -> None:
    """Refuses a run whose picture was not encoded."""
    if result.tiles != tiles:
        raise ProfileError(
            "a picture was not encoded afresh", got=f"{result.tiles} tiles", wanted=tiles
        )
