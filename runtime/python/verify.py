"""The parity ladder: pixels, prompt, image tokens, logits, greedy ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lorgnette.errors import VerifyError
from lorgnette.manifest import Bounds
from lorgnette.runtime.golden import Golden, read_golden, tiles_digest
from lorgnette.runtime.model import Model
from lorgnette.runtime.preprocess import Tiles, prepare
from lorgnette.runtime.prompt import ImagePart, Message, encode_prompt, image_slots


@dataclass(frozen=True)
class Rung:
    """One step of the ladder.

    Attributes:
        name: `pixels`, `prompt_ids`, `image_tokens`, `logits` or `greedy_ids`.
        passed: Whether it holds; a rung that is only reported always does.
        detail: What was compared and what came out.
        error: Relative error, for the rungs that have one.
        bound: What the error may be.
    """

    name: str
    passed: bool
    detail: str
    error: float | None = None
    bound: float | None = None


@dataclass(frozen=True)
class Seen:
    """What a bundle answered on its way up.

    Attributes:
        image_tokens: float32 `[G, N, D]`.
        logits: float32 `[steps, V]`, behind the prompt and the original's first tokens.
        greedy_ids: The likeliest token at each step, fed with the original's.
    """

    image_tokens: NDArray[np.float32]
    logits: NDArray[np.float32]
    greedy_ids: tuple[int, ...]
    prefilled: NDArray[np.float32] | None = None
    """float32 `[V]`, behind the prompt, by the graph for many positions where there is one."""


@dataclass(frozen=True)
class Ladder:
    """All rungs that were climbed, up to the first that failed.

    Attributes:
        rungs: The rungs.
        seen: What the bundle answered, where it got as far as logits.
    """

    rungs: tuple[Rung, ...]
    seen: Seen | None = field(default=None, compare=False, repr=False)

    @property
    def passed(self) -> bool:
        """Whether every rung held."""
        return all(rung.passed for rung in self.rungs)

    def require(self, where: object) -> None:
        """Refuses a bundle that fell off.

        Raises:
            VerifyError: Naming the rung.
        """
        for rung in self.rungs:
            if not rung.passed:
                raise VerifyError(
                    f"rung '{rung.name}' failed",
                    where=where,
                    got=rung.detail,
                    hint="the bundle does not give the original's answer",
                )


def verify(model: Model, golden: Golden | None = None, bounds: Bounds | None = None) -> Ladder:
    """Climbs the ladder.

    Args:
        model: The bundle under test.
        golden: What to compare with; None takes the bundle's own golden data.
        bounds: How far it may be from that; None takes the bundle's own bounds.
    """
    golden = golden or read_golden(model.bundle)
    bounds = bounds or model.manifest.golden.bounds
    tiles = prepare(golden.picture, model.manifest.preprocess)
    rungs = [_pixels(tiles, golden)]
    if rungs[-1].passed:
        rungs.append(_prompt_ids(model, golden))
    if rungs[-1].passed:
        image_tokens = model.engine.encode(tiles.pixels)
        rungs.append(_image_tokens(image_tokens, golden, bounds))
    if not rungs[-1].passed:
        return Ladder(tuple(rungs))
    seen = _answer(model, golden, image_tokens)
    return Ladder((*rungs, *_logits_and_ids(seen, golden, bounds)), seen)


def relative_error(got: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Norm of the difference over the norm of what was wanted; infinite for other shapes."""
    if got.shape != wanted.shape or not np.isfinite(got).all():
        return float("inf")
    norm = float(np.linalg.norm(wanted.astype(np.float64)))
    return float(np.linalg.norm(got.astype(np.float64) - wanted)) / max(norm, 1e-30)


def _pixels(tiles: Tiles, golden: Golden) -> Rung:
    text = golden.text
    if (tiles.rows, tiles.cols) != (text.rows, text.cols):
        detail = f"grid {tiles.rows}x{tiles.cols}, wanted {text.rows}x{text.cols}"
        return Rung("pixels", False, detail)
    same = tiles_digest(tiles) == text.tiles_sha256
    detail = f"{len(tiles.pixels)} tiles " + ("bit-equal" if same else "differ")
    return Rung("pixels", same, detail)


def _prompt_ids(model: Model, golden: Golden) -> Rung:
    text = golden.text
    message = Message("user", (ImagePart(text.rows, text.cols), text.question))
    ids = tuple(encode_prompt(model.manifest.prompt, model.tokenizer, [message]))
    at = _first_difference(ids, text.prompt_ids)
    detail = f"{len(ids)} ids equal" if at is None else f"differ from position {at}"
    return Rung("prompt_ids", at is None, detail)


def _image_tokens(got: NDArray[np.float32], golden: Golden, bounds: Bounds) -> Rung:
    errors = [relative_error(*pair) for pair in zip(got, golden.image_tokens, strict=True)]
    worst = int(np.argmax(errors))
    passed = errors[worst] <= bounds.image_tokens
    detail = f"relative error {errors[worst]:.2e} at tile {worst} of {len(errors)}"
    return Rung("image_tokens", passed, detail, error=errors[worst], bound=bounds.image_tokens)


def _answer(model: Model, golden: Golden, image_tokens: NDArray[np.float32]) -> Seen:
    """Feeds the prompt and the original's answer, token by token.

    The original's tokens are fed, not the bundle's: errors can then be compared at every step, and
    up to the first difference the ids are the bundle's own greedy answer.
    """
    ids, wanted = golden.text.prompt_ids, golden.text.original_greedy_ids
    embeddings = model.engine.embed(np.array(ids, np.int64))
    slots = image_slots(ids, model.manifest.spec.image_token_id)
    embeddings[slots] = image_tokens.reshape(len(slots), -1)
    state = model.engine.new_state()
    logits = state.run(embeddings, 0)
    many = model.engine.new_prefill_state()
    prefilled = many.run(embeddings, 0).copy() if many is not None else None
    kept: list[NDArray[np.float32]] = []
    got: list[int] = []
    for step, token in enumerate(wanted):
        if step < len(golden.logits):
            kept.append(logits.copy())
        got.append(int(logits.argmax()))
        if step + 1 < len(wanted):
            logits = state.run(model.engine.embed(np.array([token], np.int64)), len(ids) + step)
    return Seen(image_tokens, np.stack(kept), tuple(got), prefilled)


def _logits_and_ids(seen: Seen, golden: Golden, bounds: Bounds) -> list[Rung]:
    wanted = golden.text.original_greedy_ids
    errors = [relative_error(*pair) for pair in zip(seen.logits, golden.logits, strict=False)]
    places = [f"step {step} of {len(errors)}" for step in range(len(errors))]
    if seen.prefilled is not None:
        errors.append(relative_error(seen.prefilled, golden.logits[0]))
        places.append("the graph for many positions")
    worst = int(np.argmax(errors))
    rung = Rung(
        "logits",
        errors[worst] <= bounds.logits,
        f"relative error {errors[worst]:.2e} at {places[worst]} "
        f"behind {len(golden.text.prompt_ids)} positions",
        error=errors[worst],
        bound=bounds.logits,
    )
    return [rung, _greedy_ids(seen.greedy_ids, wanted, bounds)] if rung.passed else [rung]


def _greedy_ids(got: Sequence[int], wanted: Sequence[int], bounds: Bounds) -> Rung:
    at = _first_difference(got, wanted)
    if at is None:
        detail = f"{len(wanted)} ids equal to the original's"
    else:
        detail = f"differ from the original's at {at} of {len(wanted)}"
    if not bounds.greedy_ids_equal:
        detail += " (reported, not required of this scheme)"
    return Rung("greedy_ids", at is None or not bounds.greedy_ids_equal, detail)


def _first_difference(got: Sequence[int], wanted: Sequence[int]) -> int | None:
    if list(got) == list(wanted):
        return None
    pairs = zip(got, wanted, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(got), len(wanted)))
