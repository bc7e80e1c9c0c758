"""Golden data from the reference: what the parity ladder compares with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from lorgnette.errors import ConfigError
from lorgnette.export.checkpoint import Checkpoint
from lorgnette.export.component import Component
from lorgnette.export.reference import Reference
from lorgnette.export.weights import WeightSource
from lorgnette.manifest import Bounds
from lorgnette.quantize.plan import PLANS, QuantPlan
from lorgnette.quantize.rotation import rotated
from lorgnette.quantize.store import QuantizedModel
from lorgnette.runtime.golden import Golden, GoldenText, tiles_digest
from lorgnette.runtime.preprocess import grid_for, prepare
from lorgnette.runtime.prompt import ImagePart, Message, encode_prompt, image_slots
from lorgnette.runtime.tokenizer import Tokenizer
from lorgnette.runtime.verify import relative_error
from lorgnette.spec import ModelSpec, Preprocess, PromptSpec, TilePreprocess

if TYPE_CHECKING:
    from lorgnette.targets.capabilities import Capabilities

QUESTION = "What do you see?"
GREEDY_TOKENS = 12
LOGIT_STEPS = 4
"""Logits are kept behind the prompt and behind the original's first tokens: what a trained model
says first hardly depends on the question, and only further steps pass through the KV cache."""


FLOAT_BOUND = 5e-5
"""Relative error that another order of float32 sums may cause."""
HALF_BOUND = 5e-3
"""Relative error that float16 norms, biases and positions may cause, computed with in float32."""


@dataclass(frozen=True)
class Parts:
    """Everything that is known of a checkpoint once it is parsed."""

    checkpoint: Checkpoint
    spec: ModelSpec
    preprocess: Preprocess
    prompt: PromptSpec
    tokenizer: Tokenizer
    tokenizer_json: bytes
    """What `tokenizer` was read from."""
    context_length: int
    components: tuple[Component, ...]
    sources: Mapping[str, WeightSource]


def golden_picture() -> NDArray[np.uint8]:
    """A wide picture of 96 x 20 pixels with edges, ramps and every level of each colour.

    Wide, so that it takes the tiling path with few tiles.
    """
    row, column = np.mgrid[0:20, 0:96]
    red = (column * 255) // 95
    green = ((row // 4 + column // 8) % 2) * 255
    blue = (row * column * 7 + 31 * row) % 256
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


def golden_prompt(parts: Parts, picture: NDArray[np.uint8], question: str = QUESTION) -> list[int]:
    """The ids of a question about a picture.

    Raises:
        ConfigError: They and a short answer do not fit the context, naming what would.
    """
    height, width = picture.shape[:2]
    grid = ImagePart(*grid_for(height, width, parts.preprocess))
    ids = encode_prompt(parts.prompt, parts.tokenizer, [Message("user", (grid, question))])
    needed, context_length = len(ids) + GREEDY_TOKENS, parts.context_length
    if context_length < needed:
        raise ConfigError(
            "context length is too small for a picture and a short question",
            got=context_length,
            wanted=f"{needed} or more",
            hint="give a larger --context"
            + (
                ", or a smaller --max-tiles" if isinstance(parts.preprocess, TilePreprocess) else ""
            ),
        )
    return ids


class Treatment(NamedTuple):
    """How the engine of a target treats activations under a plan."""

    plan: QuantPlan
    """The plan, with activations as the target rounds them."""
    half: bool = False
    """Whether graphs compute in float16."""

    @property
    def rounds(self) -> bool:
        """Whether an engine rounds anything but weights."""
        schemes = (rule.scheme for rule in self.plan.rules)
        by_plan = any(scheme.activations != "float" for scheme in schemes)
        return by_plan or self.half or self.plan.cache_bits == 8

    @property
    def exact_bound(self) -> float:
        """How far a twin that rounds nothing may be from the reference.

        One of float16 stores what is no matrix in float16, too: measured on random weights in the
        shapes of SmolVLM-256M, that leaves 3e-3 of the logits.
        """
        return HALF_BOUND if self.half else FLOAT_BOUND


def treatment(plan: QuantPlan, capabilities: Capabilities) -> Treatment:
    """What a target does under a plan."""
    floats = all(rule.scheme.bits == 32 for rule in plan.rules)
    half = capabilities.arithmetic == "float16" and not floats
    return Treatment(capabilities.adapt_plan(plan), half)


def bounds_for(plan: QuantPlan, golden: GoldenText) -> Bounds:
    """How far an engine may be from the reference with the same rounded weights.

    What is left is the order of float32 sums, and, where activations are rounded to 8 bits or
    everything to float16, that rounding. Sums weigh most where weights are random: measured on the
    shapes of SmolVLM-256M with such, 1e-6 for image tokens and 4e-6 for logits; a margin of ten
    leaves no room for another GELU or another epsilon. What rounding activations costs depends on
    the weights (0.5 % of the logits where they are trained, up to 7 % where they are random), so
    the reference measures it. That is one draw: an engine, whose sums end in another order, rounds
    other values to the next code, and on a trained checkpoint came out several times as far. It
    gets five times that and two per cent; what must hold more tightly is held by graphs that round
    nothing.
    """

    def bound(lost: float) -> float:
        return 5 * lost + 0.02 if lost else FLOAT_BOUND

    return Bounds(
        image_tokens=bound(golden.rounding_activations_image_tokens),
        logits=bound(golden.rounding_activations),
        greedy_ids_equal=plan.name == "fp32",
    )


def make_golden(
    parts: Parts,
    quantized: QuantizedModel,
    progress: Callable[[str], None],
    picture: NDArray[np.uint8] | None = None,
    question: str = QUESTION,
) -> Golden:
    """`make_goldens` for an engine that treats activations just as the plan says."""
    (golden,) = make_goldens(
        parts, quantized, (Treatment(quantized.plan),), progress, picture, question
    )
    return golden


def make_goldens(
    parts: Parts,
    quantized: QuantizedModel,
    treatments: Sequence[Treatment],
    progress: Callable[[str], None],
    picture: NDArray[np.uint8] | None = None,
    question: str = QUESTION,
) -> list[Golden]:
    """Runs the reference on a picture, as published and as the plan rounds it.

    Args:
        parts: The parsed checkpoint.
        quantized: The weights as they are rounded.
        treatments: What is measured besides: how engines round activations. A golden for each.
        progress: Told about each step.
        picture: uint8 `[H, W, 3]`; None takes the golden picture.
        question: The text behind the picture.

    Raises:
        ConfigError: Picture, question and answer do not fit the context length.
    """
    picture = golden_picture() if picture is None else picture
    tiles = prepare(picture, parts.preprocess)
    ids = golden_prompt(parts, picture, question)
    components = {component.name: component for component in parts.components}
    progress("reference, original weights")
    original = Reference(components, parts.sources)
    image_tokens = original.encode(tiles.pixels)
    logits, greedy = original.generate(
        _splice(original, parts, ids, image_tokens), GREEDY_TOKENS, parts.prompt.stop_token_ids
    )
    logits = logits[:LOGIT_STEPS]
    del original
    if quantized.plan.rotate:
        image_tokens = np.stack([rotated(tile) for tile in image_tokens])
    rounded_tokens, rounded_logits = image_tokens, logits
    lost = dict.fromkeys(treatments, (0.0, 0.0))
    if quantized.plan != PLANS["fp32"]:
        progress("reference, rounded weights")
        rounded = Reference(components, quantized.sources)
        forced = greedy[:LOGIT_STEPS]
        rounded_tokens = rounded.encode(tiles.pixels)
        embeddings = _splice(rounded, parts, ids, rounded_tokens)
        rounded_logits = rounded.follow(embeddings, forced)
        for each in lost:
            if each.rounds:
                progress("reference, rounded activations")
                seen, said = _treated(rounded, each, parts, tiles.pixels, (ids, forced))
                lost[each] = (_worst(seen, rounded_tokens), _worst(said, rounded_logits))
    text = GoldenText(
        question=question,
        tiles_sha256=tiles_digest(tiles),
        rows=tiles.rows,
        cols=tiles.cols,
        prompt_ids=tuple(ids),
        original_greedy_ids=tuple(greedy),
        rounding_image_tokens=relative_error(rounded_tokens, image_tokens),
        rounding_logits=relative_error(rounded_logits, logits),
        rounding_activations=0.0,
        rounding_activations_image_tokens=0.0,
    )
    return [
        Golden(_with_losses(text, lost[each]), picture, rounded_tokens, rounded_logits)
        for each in treatments
    ]


def _with_losses(text: GoldenText, lost: tuple[float, float]) -> GoldenText:
    """What treating activations cost image tokens and logits."""
    return msgspec.structs.replace(
        text, rounding_activations_image_tokens=lost[0], rounding_activations=lost[1]
    )


def _treated(
    reference: Reference,
    how: Treatment,
    parts: Parts,
    pixels: NDArray[np.uint8],
    said: tuple[Sequence[int], Sequence[int]],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Image tokens and logits of the reference with activations treated as an engine does.

    Args:
        reference: The reference with rounded weights.
        how: How activations are treated.
        parts: The parsed checkpoint.
        pixels: The tiles.
        said: The prompt's ids and those of the answer that is followed.
    """
    reference.round_activations(how.plan)
    if how.half:
        reference.compute_in_half()
    seen = reference.encode(pixels)
    logits = reference.follow(_splice(reference, parts, said[0], seen), said[1])
    reference.stop_rounding()
    return seen, logits


def _worst(got: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """The largest relative error of any tile or step."""
    return max(map(relative_error, got, wanted))


def _splice(
    reference: Reference, parts: Parts, ids: Sequence[int], image_tokens: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Embeddings of a prompt with image tokens in their places."""
    embeddings = reference.embed(ids).copy()
    slots = image_slots(ids, parts.spec.image_token_id)
    embeddings[slots] = image_tokens.reshape(len(slots), -1)
    return embeddings
