"""Pictures to image tokens, each distinct picture encoded once."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lorgnette.runtime.engines.engine import Engine, Float
from lorgnette.runtime.preprocess import Tiles

PictureSource = str | Path | bytes | Image.Image | NDArray[np.generic]
"""A picture: a file, the bytes of one, a Pillow picture, or uint8 RGB `[H, W, 3]`."""

TILES_PER_CALL = 1
"""Tiles encoded at once. A tile's thousand patches fill the cores; more only cost memory."""
CACHE_BYTES = 64 * 2**20
"""Image tokens kept for pictures that come again; the oldest go first."""


@dataclass(frozen=True, eq=False)
class EncodedPicture:
    """A picture as the decoder reads it.

    Attributes:
        tokens: float32 `[G * N, D]`, tiles row by row, thumbnail last.
        rows: Tiles from top to bottom, 0 for a single tile.
        cols: Tiles from left to right, 0 for a single tile.
    """

    tokens: Float
    rows: int
    cols: int


class PictureCache:
    """Image tokens by the content of the tiles; safe to use from several threads."""

    def __init__(self, limit_bytes: int = CACHE_BYTES) -> None:
        """Starts empty."""
        self._limit = limit_bytes
        self._held: OrderedDict[bytes, EncodedPicture] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> EncodedPicture | None:
        """The picture of a key, marked as just used."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
            return self._held.get(key)

    def put(self, key: bytes, picture: EncodedPicture) -> None:
        """Keeps a picture, dropping the least recently used beyond the limit."""
        with self._lock:
            self._held[key] = picture
            total = sum(held.tokens.nbytes for held in self._held.values())
            while total > self._limit and len(self._held) > 1:
                _, dropped = self._held.popitem(last=False)
                total -= dropped.tokens.nbytes


def content_key(tiles: Tiles) -> bytes:
    """A digest of what the vision encoder would see."""
    digest = hashlib.sha256(f"{tiles.rows}x{tiles.cols}".encode())
    digest.update(tiles.pixels.data)
    return digest.digest()


def encode_picture(
    engine: Engine, tiles: Tiles, cache: PictureCache, check: Callable[[], None]
) -> tuple[EncodedPicture, bool]:
    """Image tokens of a picture, from the cache where it has been seen.

    Args:
        engine: Runs the vision encoder.
        tiles: The preprocessed picture.
        cache: Where encoded pictures are kept.
        check: Called between vision calls; may raise to stop.

    Returns:
        The picture, and whether it had to be encoded.
    """
    key = content_key(tiles)
    found = cache.get(key)
    if found is not None:
        return found, False
    parts = []
    for start in range(0, len(tiles.pixels), TILES_PER_CALL):
        check()
        end = start + TILES_PER_CALL
        parts.append(engine.encode(tiles.pixels[start:end], more=end < len(tiles.pixels)))
    tokens = np.concatenate(parts)
    picture = EncodedPicture(tokens.reshape(-1, tokens.shape[-1]), tiles.rows, tiles.cols)
    cache.put(key, picture)
    return picture, True


def encode_pictures(
    engine: Engine, pictures: Sequence[Tiles], cache: PictureCache, check: Callable[[], None]
) -> tuple[list[EncodedPicture], int]:
    """Image tokens of several pictures, and how many tiles the vision encoder ran on for them.

    The arguments are those of `encode_picture`.
    """
    encoded: list[EncodedPicture] = []
    tiles_run = 0
    for tiles in pictures:
        check()
        picture, fresh = encode_picture(engine, tiles, cache, check)
        tiles_run += len(tiles.pixels) if fresh else 0
        encoded.append(picture)
    return encoded, tiles_run
