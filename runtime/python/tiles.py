"""What preprocessing takes and gives, whatever its kind."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorgnette.errors import ImageError
from lorgnette.runtime.resample import Pixels

MAX_SIDE = 16_384
"""Most pixels along one side of a picture."""
MAX_PIXELS = 64_000_000
"""Most pixels of a picture."""
MAX_TILE_SIZE = 4096
"""Largest side of a tile in pixels; no image processor resizes beyond it."""


@dataclass(frozen=True, eq=False)
class Tiles:
    """A picture as the vision encoder wants it.

    Attributes:
        pixels: uint8[G, 3, tile, tile], C-contiguous: the tiles row by row, then, where the
            picture was split, its thumbnail.
        rows: Tiles from top to bottom; 0 where the picture is one tile.
        cols: Tiles from left to right; 0 where the picture is one tile.
    """

    pixels: Pixels
    rows: int
    cols: int


def check_size(height: int, width: int, where: str | None = None) -> None:
    """Refuses a picture without pixels or with too many.

    Raises:
        ImageError: If a side is 0 or the picture is over `MAX_SIDE` or `MAX_PIXELS`.
    """
    if height < 1 or width < 1:
        raise ImageError(
            "empty picture", where=where, got=f"{width} x {height} pixels", wanted="at least 1 x 1"
        )
    if max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise ImageError(
            "picture too large",
            where=where,
            got=f"{width} x {height} pixels",
            wanted=f"sides of at most {MAX_SIDE} and at most {MAX_PIXELS} pixels",
            hint="make it smaller first",
        )


def check_pixels(image: npt.NDArray[np.generic]) -> None:
    """Refuses an array that is not a picture.

    Raises:
        ImageError: If the array is not uint8[H, W, 3] or is of a size that `check_size` refuses.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ImageError(
            "not a picture",
            got=f"{image.dtype}{list(image.shape)}",
            wanted="uint8[H, W, 3], red, green, blue",
        )
    check_size(image.shape[0], image.shape[1])
