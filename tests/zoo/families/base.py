"""What the zoo needs to know of a family of models: layout, prompt, pixels and forward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tests.zoo.draw import Lettering, Scene
from tests.zoo.model import Config, Params, Shapes
from tests.zoo.questions import Exam
from tests.zoo.tokenizer import Tokens

WHOLE = Exam(widest=2.0, lettering=Lettering(18.0, 26.0, tiled=False))
"""What families are asked that see the picture whole, at a size where text must be larger."""


@dataclass(frozen=True)
class Pixels:
    """A preprocessed picture.

    Shapes:
        values: uint8 [G, S, S, 3]; one picture, or SmolVLM's tiles with the thumbnail last.
    """

    values: NDArray[np.uint8]
    grid: tuple[int, int] = (0, 0)
    """Rows and columns of tiles; zero where the whole picture is one."""


class Family(ABC):
    """One kind of checkpoint. A member is a module with one subclass."""

    name: str
    """Folder of the checkpoint under `checkpoints`."""
    model_type: str
    exam: Exam
    """What its checkpoint learns and is scored on."""
    label_kinds: tuple[str, ...]
    """Which labels the warm-up learns, of those in `labels.CLASSES`."""
    outputs: tuple[str, ...]
    """Tensors to scale to scale what the projector gives."""
    untrained: tuple[str, ...] = ()
    """Parts of names that no output depends on."""

    @abstractmethod
    def train_tokenizer(self) -> Tokens:
        """The tokenizer; every call gives the same."""

    @abstractmethod
    def load_tokenizer(self, folder: Path) -> Tokens:
        """The tokenizer of a checkpoint."""

    @abstractmethod
    def config(self, tokens: Tokens) -> Config:
        """config.json of the tiny checkpoint."""

    @abstractmethod
    def other_files(self, config: Config, tokens: Tokens) -> dict[str, Config]:
        """The other JSON files, by path inside the checkpoint."""

    @abstractmethod
    def param_shapes(self, config: Config) -> Shapes:
        """Every tensor of the layout."""

    @abstractmethod
    def pixels(self, image: Image.Image) -> Pixels:
        """The preprocessing."""

    @abstractmethod
    def patch_labels(self, scene: Scene, pixels: Pixels) -> NDArray[np.int64]:
        """What each labelled patch shows.

        Shapes:
            returns: [G, N, K, len(label_kinds)] for N image tokens of K patches each.
        """

    @property
    @abstractmethod
    def side(self) -> int:
        """Rows, and columns, of labelled patches of one picture or tile."""

    @abstractmethod
    def image_id(self, config: Config) -> int:
        """The id that stands for an image token; may be no id of the tokenizer."""

    @abstractmethod
    def prefix(self, tokens: Tokens, config: Config, grid: tuple[int, int]) -> list[int]:
        """Ids of everything before the question, image tokens included."""

    @abstractmethod
    def asked(self, tokens: Tokens, question: str) -> list[int]:
        """Ids of the question and of what follows until the model writes."""

    @abstractmethod
    def answered(self, tokens: Tokens, question: str, answer: str) -> list[int]:
        """Ids the model should write after `asked`, up to and with its end."""

    @abstractmethod
    def end_id(self, tokens: Tokens) -> int:
        """The id at which an answer ends."""

    def answer_text(self, tokens: Tokens, ids: list[int]) -> str:
        """The answer in the ids that a model wrote."""
        return tokens.decode(ids).strip()

    @abstractmethod
    def image_tokens(self, params: Params, config: Config, pixels: Tensor) -> Tensor:
        """Vision transformer and projector.

        Shapes:
            pixels: uint8 [B, S, S, 3]. returns: [B, N, width].
        """

    @abstractmethod
    def decode(
        self, params: Params, config: Config, x: Tensor, positions: Tensor, mask: Tensor
    ) -> Tensor:
        """The decoder, as `model.decode`."""

    @abstractmethod
    def embedding(self) -> str:
        """Name of the token embeddings."""

    @abstractmethod
    def head(self) -> str:
        """Name of the output matrix; the embeddings where tied."""
