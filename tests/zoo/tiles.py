"""From a picture to tiles, as the published SmolVLM preprocessing does it.

Source: transformers 5.23, SmolVLMImageProcessorPil. The copy exists because the original needs
several milliseconds a picture and training draws hundreds of thousands; a test compares the two.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def resize_to_grid(image: Image.Image, tile: int, longest_edge: int) -> Image.Image:
    """Bring the longest side to `longest_edge`, then both sides up to multiples of `tile`."""
    width, height = image.size
    aspect = width / height
    if width >= height:
        width, height = longest_edge, int(longest_edge / aspect)
        height += height % 2
    else:
        width, height = int(longest_edge * aspect), longest_edge
        width += width % 2
    image = image.resize((max(width, 1), max(height, 1)), Image.Resampling.LANCZOS)
    aspect = image.width / image.height
    if image.width >= image.height:
        width = math.ceil(image.width / tile) * tile
        height = math.ceil(int(width / aspect) / tile) * tile
    else:
        height = math.ceil(image.height / tile) * tile
        width = math.ceil(int(height * aspect) / tile) * tile
    return image.resize((width, height), Image.Resampling.LANCZOS)


def split(image: Image.Image, tile: int, longest_edge: int) -> tuple[NDArray[np.uint8], int, int]:
    """Cut a picture into tiles.

    Returns:
        The tiles row by row with the thumbnail last, then rows and columns; both are 0 where the
        whole picture is one tile.

    Shapes:
        tiles: uint8 [G, tile, tile, 3].
    """
    image = resize_to_grid(image, tile, longest_edge)
    pixels = np.asarray(image)
    rows, cols = image.height // tile, image.width // tile
    if rows == cols == 1:
        return pixels[None], 0, 0
    grid = pixels.reshape(rows, tile, cols, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
    thumbnail = np.asarray(image.resize((tile, tile), Image.Resampling.LANCZOS))
    return np.concatenate([grid, thumbnail[None]]), rows, cols
