"""Broken copies of bundles, pictures, and an engine that answers what a test wants."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lorgnette.runtime.chat import Chat
from lorgnette.runtime.engines.engine import WholeEngine
from lorgnette.runtime.engines.onnx import OnnxDecoderState
from lorgnette.runtime.model import Model, open_model
from lorgnette.runtime.prompt import Message, encode_prompt

Json = dict[str, Any]
Float = NDArray[np.float32]

GOLDEN = Path(__file__).parents[1] / "golden"
PICTURE_ID = -1000.0
"""What the first image token of a tile is in the fake engine's cache; later ones are below."""


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """A picture with smooth parts and noise, another one for every seed."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[0:height, 0:width]
    shade = np.stack([row * 3, column * 2, row + column], axis=-1) + rng.integers(0, 256, 3)
    return ((shade + rng.integers(0, 40, shade.shape)) % 256).astype(np.uint8)


def shared_data(name: str) -> Path:
    """A file of `shared/data`, a folder beside the repository or above it; skips without it."""
    for folder in Path(__file__).resolve().parents[2:]:
        path = folder / "shared" / "data" / name
        if path.exists():
            return path
    pytest.skip(f"shared/data/{name} is not there")


def copy_bundle(source: Path, target: Path) -> Path:
    """A copy that may be broken."""
    shutil.copytree(source, target)
    return target


def edit_json(path: Path, change: Callable[[Json], None]) -> None:
    """Changes a JSON file in place."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_manifest(bundle: Path, change: Callable[[Json], None]) -> Path:
    """Changes the manifest of a copy."""
    edit_json(bundle / "manifest.json", change)
    return bundle


def redigest(bundle: Path) -> Path:
    """Makes the manifest say what the files are, so that only their meaning is wrong."""

    def change(manifest: Json) -> None:
        for entry in manifest["files"]:
            data = (bundle / entry["path"]).read_bytes()
            entry["bytes"], entry["sha256"] = len(data), hashlib.sha256(data).hexdigest()

    return edit_manifest(bundle, change)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class FakeEngine(WholeEngine):
    """Holds token ids where a real one holds keys and values, and answers by a function.

    Args:
        answer: Gives the next id for everything in the cache: ids, and for image tokens numbers
            of `PICTURE_ID` and below.
        capacity: Positions of a cache.
    """

    def __init__(self, answer: Callable[[list[int]], int], capacity: int = 1024) -> None:
        """Starts with nothing seen; `attach` fills in the sizes."""
        self.answer = answer
        self.capacity = capacity
        self.width = self.vocab = self.per_tile = 0
        self.runs: list[tuple[int, int]] = []
        """Past length and new positions of every decoder call, of all caches."""
        self.tiles: list[int] = []
        """Tiles of every vision call."""
        self.on_run: Callable[[int], None] = lambda count: None
        """Called in every decoder call with its number, from 1."""
        self.on_encode: Callable[[int], None] = lambda count: None
        """The same for vision calls."""

    def attach(self, model: Model) -> None:
        """Takes the sizes of a bundle."""
        spec = model.manifest.spec
        self.width, self.vocab = spec.text.hidden_size, spec.text.vocab_size
        self.per_tile = spec.image_tokens_per_tile

    def encode(self, tiles: NDArray[np.uint8], *, more: bool = False) -> Float:
        """Image tokens that tell of which tile and place they are."""
        self.tiles.append(len(tiles))
        self.on_encode(len(self.tiles))
        tokens = np.zeros((len(tiles), self.per_tile, self.width), np.float32)
        for tile, pixels in zip(tokens, tiles, strict=True):
            content = int(hashlib.sha256(pixels.tobytes()).hexdigest()[:3], 16)
            tile[:, 0] = PICTURE_ID - content * 100 - np.arange(self.per_tile)
        return tokens

    def embed(self, token_ids: NDArray[np.int64]) -> Float:
        """The ids themselves."""
        embeddings = np.zeros((len(token_ids), self.width), np.float32)
        embeddings[:, 0] = token_ids
        return embeddings

    def new_state(self) -> FakeState:
        """An empty cache."""
        return FakeState(self)


class FakeState:
    """The cache of a `FakeEngine`; refuses what a real one would get wrong in silence."""

    def __init__(self, engine: FakeEngine) -> None:
        """Starts empty."""
        self.capacity = engine.capacity
        self.held: list[int] = []
        self._engine = engine

    def run(self, embeddings: Float, past_length: int) -> Float:
        """Puts positions behind `past_length` and asks for the answer."""
        assert past_length <= len(self.held), "positions were left out"
        assert past_length + len(embeddings) <= self.capacity, "the cache overflows"
        assert len(embeddings) > 0
        # What an engine that fails half-way leaves behind is written, but not to be relied on.
        self.held[past_length:] = [int(row[0]) for row in embeddings]
        self._engine.runs.append((past_length, len(embeddings)))
        self._engine.on_run(len(self._engine.runs))
        logits = np.zeros(self._engine.vocab, np.float32)
        logits[self._engine.answer(list(self.held))] = 1
        return logits


def fake_model(path: Path, engine: FakeEngine) -> Model:
    """A bundle with everything real but its engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorgnette.runtime.model.open_engine", lambda bundle, threads: engine)
        model = open_model(path, threads=1)
    engine.attach(model)
    return model


def script(ids: Sequence[int], last: int) -> Callable[[list[int]], int]:
    """Answers the ids one after the other, then `last` for ever."""
    left = list(ids)
    return lambda _: left.pop(0) if left else last


def held(chat: Chat) -> list[int]:
    """What a fake cache holds; image tokens as they were encoded."""
    return chat._state.held  # type: ignore[attr-defined,no-any-return]


def prompt_ids(model: Model, *messages: Message) -> list[int]:
    """The ids of a whole conversation."""
    return encode_prompt(model.manifest.prompt, model.tokenizer, list(messages))


def user(text: str) -> Message:
    """A message without pictures."""
    return Message("user", (text,))


def state_of(model: Model) -> OnnxDecoderState:
    """An empty KV cache of onnxruntime's."""
    state = model.engine.new_state()
    assert isinstance(state, OnnxDecoderState)
    return state


def some_ids(model: Model, count: int, seed: int = 0) -> np.ndarray:
    """Tokens at random, none of the first three, which mean something."""
    rng = np.random.default_rng(seed)
    return rng.integers(3, model.manifest.spec.text.vocab_size, count)


def run(model: Model, state: OnnxDecoderState, ids: np.ndarray, past: int) -> Float:
    """Logits behind `ids`, of which there are `past` in front."""
    return state.run(model.engine.embed(ids), past).copy()
