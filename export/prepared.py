"""Questions about pictures in the form that the components take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorgnette.export.check import Parts
from lorgnette.quantize.samples import Sample
from lorgnette.runtime.image import load_image
from lorgnette.runtime.preprocess import grid_for, prepare
from lorgnette.runtime.prompt import ImagePart, Message, encode_prompt, image_slots

POSITIONS = 6144
"""Positions of the decoder that are calibrated with, about."""


@dataclass(frozen=True, eq=False)
class PreparedSample:
    """A question with its picture.

    Attributes:
        tiles: uint8 `[G, 3, edge, edge]`.
        prompt_ids: The prompt.
        slots: int64, positions of image tokens in it.
        answer_ids: What a sample says is the answer, as the model would write it; empty where it
            says nothing.
    """

    tiles: NDArray[np.uint8]
    prompt_ids: tuple[int, ...]
    slots: NDArray[np.int64]
    answer_ids: tuple[int, ...]


def prepare_samples(
    parts: Parts, samples: Iterable[Sample], positions: int = POSITIONS
) -> list[PreparedSample]:
    """Samples as a model takes them, without those that do not fit its context.

    Args:
        parts: The parsed checkpoint.
        samples: Pictures with questions.
        positions: Where so many are reached, the rest is left out: more would take long, and
            change little.
    """
    found: list[PreparedSample] = []
    for sample in samples:
        prepared = _prepare(parts, sample)
        if prepared is not None:
            found.append(prepared)
            positions -= len(prepared.prompt_ids)
        if positions <= 0:
            break
    return found


def _prepare(parts: Parts, sample: Sample) -> PreparedSample | None:
    picture = load_image(sample.image)
    height, width = picture.shape[:2]
    part = ImagePart(*grid_for(height, width, parts.preprocess))
    ids = encode_prompt(parts.prompt, parts.tokenizer, [Message("user", (part, sample.question))])
    answer: tuple[int, ...] = ()
    if sample.answer:
        header = parts.prompt.answer_header or ""
        answer = tuple(parts.tokenizer.encode(header + sample.answer))
        answer += parts.prompt.stop_token_ids[:1]
    if len(ids) + len(answer) > parts.context_length:
        return None
    return PreparedSample(
        tiles=prepare(picture, parts.preprocess).pixels,
        prompt_ids=tuple(ids),
        slots=np.array(image_slots(ids, parts.spec.image_token_id), np.int64),
        answer_ids=answer,
    )
