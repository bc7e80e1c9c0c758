"""What the original in float32 answers to a set of questions about pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lorgnette.errors import DatasetError, RequestError
from lorgnette.export.check import Parts
from lorgnette.export.reference import Reference
from lorgnette.quantize.samples import Sample, samples_digest
from lorgnette.runtime.answer_text import AnswerText
from lorgnette.runtime.image import load_image
from lorgnette.runtime.preprocess import Tiles, grid_for, prepare
from lorgnette.runtime.prompt import ImagePart, Message, encode_prompt, image_slots
from lorgnette.runtime.tokenizer import Tokenizer
from lorgnette.spec import Preprocess, PromptSpec

MAX_NEW_TOKENS = 24
"""Tokens of an answer that are compared; of each, a row of logits is held in memory."""

CACHE_BYTES = 2 * 2**30
"""What the KV caches of answers that are made together may take."""

Float = NDArray[np.float32]
Tell = Callable[[int, int], None]
"""Told after each sample how many are done, and of how many."""


@dataclass(frozen=True, eq=False)
class OriginalAnswer:
    """What the original makes of one sample.

    Attributes:
        sample: The picture and the question.
        prompt_ids: The prompt, image tokens as placeholders.
        image_tokens: float32 `[G, N, D]`.
        greedy_ids: Its answer, the stop token included where it came to that.
        logits: float32 `[K, V]`: what each of the K tokens was chosen from.
        preprocess: How its picture becomes tiles.
    """

    sample: Sample
    prompt_ids: tuple[int, ...]
    image_tokens: Float
    greedy_ids: tuple[int, ...]
    logits: Float
    preprocess: Preprocess

    def tiles(self) -> Tiles:
        """The picture as the vision encoder takes it; made afresh, since tiles are large."""
        return prepare(load_image(self.sample.image), self.preprocess)


@dataclass(frozen=True, eq=False)
class OriginalAnswers:
    """What the original makes of a set of samples.

    Attributes:
        answers: One for each sample that fits the context.
        skipped: Samples that do not.
        sample_set: Name of the set.
        digest: What the set is known by: see `samples_digest`.
        max_new_tokens: Tokens at which an answer was cut off.
        tokenizer: The tokenizer of the checkpoint.
        prompt: Its chat template.
        image_token_id: The placeholder of an image token.
        context_length: The context that the samples had to fit.
    """

    answers: tuple[OriginalAnswer, ...]
    skipped: int
    sample_set: str
    digest: str
    max_new_tokens: int
    # Not the checkpoint itself: it is mapped into memory, and an engine's copy comes next.
    tokenizer: Tokenizer
    prompt: PromptSpec
    image_token_id: int
    context_length: int

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids, as the runtime would show it."""
        shown = AnswerText(self.tokenizer, self.prompt.answer_header)
        pieces = [shown.push(i) for i in ids if i not in self.prompt.stop_token_ids]
        return "".join([*pieces, shown.finish()])


def silent(_done: int, _of: int) -> None:
    """Tells nobody."""


def original_answers(
    parts: Parts,
    samples: Sequence[Sample],
    max_new_tokens: int = MAX_NEW_TOKENS,
    *,
    sample_set: str = "samples",
    reference: Reference | None = None,
    tell: Tell = silent,
) -> OriginalAnswers:
    """Lets the original answer every sample that fits the context.

    Memory: `max_new_tokens` rows of logits a sample, and its image tokens.

    Args:
        parts: The checkpoint.
        samples: Pictures and questions.
        max_new_tokens: The most tokens of an answer.
        sample_set: What the set is called.
        reference: Runs the original; None makes one and drops it.
        tell: Told after each sample.

    Raises:
        DatasetError: A question cannot be asked, or none fits the context.
        ImageError: A picture cannot be read.
    """
    components = {component.name: component for component in parts.components}
    reference = reference or Reference(components, parts.sources)
    asked = list(_ask(parts, samples, reference, max_new_tokens, tell))
    if not asked:
        raise DatasetError(
            "no sample fits the context length",
            where=sample_set,
            got=f"{parts.context_length} tokens for {len(samples)} samples",
            hint="give a larger --context, or shorter questions",
        )
    prompts = [each.embeddings for each in asked]
    said = [
        answer
        for lot in _together(prompts, parts, max_new_tokens)
        for answer in reference.generate_all(lot, max_new_tokens, parts.prompt.stop_token_ids)
    ]
    answers = tuple(
        OriginalAnswer(
            q.sample, tuple(q.ids), q.image_tokens, tuple(greedy), logits, parts.preprocess
        )
        for q, (logits, greedy) in zip(asked, said, strict=True)
    )
    return OriginalAnswers(
        answers=answers,
        skipped=len(samples) - len(answers),
        sample_set=sample_set,
        digest=samples_digest(samples),
        max_new_tokens=max_new_tokens,
        tokenizer=parts.tokenizer,
        prompt=parts.prompt,
        image_token_id=parts.spec.image_token_id,
        context_length=parts.context_length,
    )


class _Asked(NamedTuple):
    """A question that fits the context, before its answer."""

    sample: Sample
    ids: list[int]
    image_tokens: Float
    embeddings: Float


def _ask(
    parts: Parts,
    samples: Sequence[Sample],
    reference: Reference,
    max_new_tokens: int,
    tell: Tell,
) -> Iterator[_Asked]:
    """Every sample that leaves room for an answer, its picture encoded."""
    encoder = PromptEncoder(reference.encode, reference.embed)
    for done, sample in enumerate(samples, start=1):
        picture = load_image(sample.image)
        ids = sample_prompt(parts, sample, *picture.shape[:2])
        if len(ids) + max_new_tokens <= parts.context_length:
            image_tokens = encoder.encode(sample, partial(prepare, picture, parts.preprocess))
            embeddings = encoder.splice(ids, parts.spec.image_token_id, image_tokens)
            yield _Asked(sample, ids, image_tokens, embeddings)
        tell(done, len(samples))


def _together(prompts: Sequence[Float], parts: Parts, max_new_tokens: int) -> Iterator[list[Float]]:
    """Prompts in lots whose KV caches fit `CACHE_BYTES`; a lot is one prompt at least."""
    text = parts.spec.text
    per_position = 2 * text.layers * text.kv_heads * text.head_size * 4
    lot: list[Float] = []
    held = 0
    for prompt in prompts:
        needed = (len(prompt) + max_new_tokens) * per_position
        if lot and held + needed > CACHE_BYTES:
            yield lot
            lot, held = [], 0
        lot.append(prompt)
        held += needed
    if lot:
        yield lot


def sample_prompt(parts: Parts, sample: Sample, height: int, width: int) -> list[int]:
    """The prompt of a sample, as the golden data's is made.

    Raises:
        DatasetError: The question holds the text of a special token.
    """
    grid = ImagePart(*grid_for(height, width, parts.preprocess))
    try:
        return encode_prompt(
            parts.prompt, parts.tokenizer, [Message("user", (grid, sample.question))]
        )
    except RequestError as error:
        raise DatasetError(
            "a question cannot be asked", where=sample.name or None, got=error
        ) from error


class PromptEncoder:
    """Makes image tokens and prompts; the last picture is remembered.

    Sets commonly ask several questions in a row about one picture, and encoding it is most of the
    work.
    """

    def __init__(
        self, encode: Callable[[NDArray[np.uint8]], Float], embed: Callable[[list[int]], Float]
    ) -> None:
        """Takes what encodes tiles and what embeds tokens."""
        self._encode = encode
        self._embed = embed
        self._last: tuple[object, Float] | None = None

    def encode(self, sample: Sample, tiles: Callable[[], Tiles]) -> Float:
        """Image tokens `[G, N, D]` of a sample's picture, one tile at a time."""
        if self._last is None or self._last[0] != sample.image:
            found = [self._encode(tile[None]) for tile in tiles().pixels]
            self._last = (sample.image, np.concatenate(found))
        return self._last[1]

    def splice(self, ids: Sequence[int], image_token_id: int, image_tokens: Float) -> Float:
        """Embeddings `[T, D]` of a prompt with image tokens in their places."""
        embeddings = self._embed(list(ids)).copy()
        slots = image_slots(ids, image_token_id)
        embeddings[slots] = image_tokens.reshape(len(slots), -1)
        return embeddings
