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
    parts: Parts, samples: Iterable[Sample], reserve: int = 0
) -> list[PreparedSample | None]:
    """Samples as a model takes them; None for those that do not fit its context.

    Args:
        parts: The parsed checkpoint.
        samples: Pictures with questions.
        reserve: Tokens that must fit behind the prompt.
    """
    return [_prepare(parts, sample, reserve) for sample in samples]


def _prepare(parts: Parts, sample: Sample, reserve: int) -> PreparedSample | None:
    picture = load_image(sample.image)
    height, width = picture.shape[:2]
    part = ImagePart(*grid_for(height, width, parts.preprocess))
    ids = encode_prompt(parts.prompt, parts.tokenizer, [Message("user", (part, sample.question))])
    answer: tuple[int, ...] = ()
    if sample.answer:
        header = parts.prompt.answer_header or ""
        answer = tuple(parts.tokenizer.encode(header + sample.answer))
        answer += parts.prompt.stop_token_ids[:1]
    if len(ids) + max(len(answer), reserve) > parts.context_length:
        return None
    return PreparedSample(
        tiles=prepare(picture, parts.preprocess).pixels,
        prompt_ids=tuple(ids),
        slots=np.array(image_slots(ids, parts.spec.image_token_id), np.int64),
        answer_ids=answer,
    )
