"""Pictures to measure with: a new one for every run, so that no cache answers."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path

import msgspec
import numpy as np

from lorgnette.runtime.image import load_image
from lorgnette.runtime.model import Model
from lorgnette.runtime.preprocess import grid_for
from lorgnette.runtime.resample import Pixels
from lorgnette.spec import Preprocess, TilePreprocess

DRAWN = "drawn"
"""What a picture is called that no file was given for."""
_NUMBERS = itertools.count()
"""Of every picture that this process took."""


class FreshPictures:
    """A picture whose corner is another one each time it is taken.

    Args:
        source: A file, or None for a drawn picture.
        side: Width and height of the drawn one, in pixels.

    Raises:
        ImageError: The file is no picture.
    """

    def __init__(self, source: str | Path | None, side: int) -> None:
        """Reads or draws it."""
        self._base = draw(side) if source is None else load_image(source)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, in pixels."""
        return self._base.shape[1], self._base.shape[0]

    def take(self) -> Pixels:
        """One that was not taken before, of 16 million.

        Shapes:
            uint8[H, W, 3]
        """
        picture = self._base.copy()
        # A quarter of each side: enough to survive being scaled down to any tile.
        height, width = max(len(picture) // 4, 1), max(picture.shape[1] // 4, 1)
        # Far apart for runs that follow each other.
        number = next(_NUMBERS) * 0x9E3779 % 2**24
        picture[:height, :width] = [number >> 16, number >> 8 & 255, number & 255]
        return picture


def draw(side: int) -> Pixels:
    """A square picture with smooth parts, edges and grain; the same one each time.

    Shapes:
        uint8[side, side, 3]
    """
    y, x = np.mgrid[0:side, 0:side].astype(np.float64) / side
    planes = np.stack([x * 220, y * 220, (x + y) * 110], axis=-1)
    planes[(x - 0.6) ** 2 + (y - 0.55) ** 2 < 0.06] = (200, 40, 60)
    planes[(x * 16).astype(int) % 2 == (y * 16).astype(int) % 2] += 20
    planes += np.random.default_rng(0).integers(0, 16, planes.shape)
    drawn: Pixels = np.clip(planes, 0, 255).astype(np.uint8)
    return drawn


def one_tile(spec: Preprocess) -> Preprocess:
    """The preprocessing that makes one tile of every picture, as `--max-tiles 1` exports it."""
    if isinstance(spec, TilePreprocess):
        return msgspec.structs.replace(spec, longest_edge=spec.tile_size, split=False)
    return spec


def with_preprocess(model: Model, spec: Preprocess) -> Model:
    """The same opened model, which prepares pictures otherwise."""
    other = copy.copy(model)
    manifest = msgspec.structs.replace(model.manifest, preprocess=spec)
    other.bundle = dataclasses.replace(model.bundle, manifest=manifest)
    return other


def tile_count(pictures: FreshPictures, spec: Preprocess) -> int:
    """Tiles that a picture becomes, the thumbnail included."""
    width, height = pictures.size
    rows, cols = grid_for(height, width, spec)
    return rows * cols + 1
