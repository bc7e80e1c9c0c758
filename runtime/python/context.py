"""What a conversation consists of, and what is known of a turn before its answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lorgnette.runtime.engines.engine import Float
from lorgnette.runtime.pictures import EncodedPicture

if TYPE_CHECKING:
    from lorgnette.runtime.model import Model


@dataclass
class Context:
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


@dataclass(frozen=True)
class Turn:
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
