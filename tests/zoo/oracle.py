"""The families through transformers: the reference for training, and what evaluation asks."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from tests.composed_oracle import ComposedOracle, mobilevlm_oracle, omnivlm_oracle
from tests.zoo.families.base import Pixels
from tests.zoo.families.mobilevlm import IMAGE_ID, tower_config
from tests.zoo.model import Config, Params


class Oracle(Protocol):
    """A checkpoint in fp32. Ids are a prompt with its image tokens."""

    def logits(self, ids: list[int], picture: Pixels) -> Tensor:
        """All logits, [T, vocab]."""

    def greedy(self, ids: list[int], picture: Pixels, steps: int) -> list[int]:
        """The next `steps` ids, or fewer where the model knows its end."""


def oracle(config: Config, weights: Params) -> Oracle:
    """A checkpoint by its model type."""
    if config["model_type"] == "smolvlm":
        return _SmolVLM(config, weights)
    if config["model_type"] == "mobilevlm":
        return _Composed(mobilevlm_oracle(config, tower_config(), weights))
    return _Composed(omnivlm_oracle(config, weights))


class _Composed:
    def __init__(self, inner: ComposedOracle) -> None:
        self.inner = inner

    def _ids(self, ids: list[int]) -> list[int]:
        # The composed model wants an id that has an embedding.
        return [self.inner.image_id if i == IMAGE_ID else i for i in ids]

    def logits(self, ids: list[int], picture: Pixels) -> Tensor:
        return self.inner.logits(self._ids(ids), _channels_first(picture))

    def greedy(self, ids: list[int], picture: Pixels, steps: int) -> list[int]:
        return self.inner.greedy(self._ids(ids), _channels_first(picture), steps)


class _SmolVLM:
    def __init__(self, config: Config, weights: Params) -> None:
        self.model = SmolVLMForConditionalGeneration(SmolVLMConfig(**config))
        self.model.load_state_dict(weights)
        self.model.float().eval()

    def _inputs(self, ids: list[int], picture: Pixels) -> dict[str, Tensor]:
        pixels = torch.from_numpy(_channels_first(picture)).float()[None] / 127.5 - 1
        tensor = torch.tensor([ids])
        return {
            "input_ids": tensor,
            "attention_mask": torch.ones_like(tensor),
            "pixel_values": pixels,
            "pixel_attention_mask": torch.ones(pixels[:, :, 0].shape, dtype=torch.bool),
        }

    @torch.no_grad()
    def logits(self, ids: list[int], picture: Pixels) -> Tensor:
        out: Tensor = self.model(**self._inputs(ids, picture)).logits[0]
        return out

    @torch.no_grad()
    def greedy(self, ids: list[int], picture: Pixels, steps: int) -> list[int]:
        out = self.model.generate(
            **self._inputs(ids, picture), max_new_tokens=steps, do_sample=False, pad_token_id=2
        )
        return [int(i) for i in out[0, len(ids) :]]


def _channels_first(picture: Pixels) -> NDArray[np.uint8]:
    return np.ascontiguousarray(picture.values.transpose(0, 3, 1, 2))
