"""From a picture to the tiles that the vision encoder reads.

The tiles stay uint8: the vision encoder casts and normalises inside its graph. `pixel_values`
gives the same numbers outside of it, for checks. Each kind of preprocessing has a file of its own.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from lorgnette.errors import ConfigError
from lorgnette.runtime.preprocess_square import check_square, square_picture
from lorgnette.runtime.preprocess_tiles import (
    check_tile_sizes,
    longest_edge_for_max_tiles,
    resize_steps,
    split_picture,
    tile_grid,
)
from lorgnette.runtime.resample import Pixels
from lorgnette.runtime.tiles import MAX_PIXELS, MAX_SIDE, Tiles, check_pixels, check_size
from lorgnette.spec import Preprocess, SquarePreprocess

__all__ = [
    "MAX_PIXELS",
    "MAX_SIDE",
    "Tiles",
    "check_pixels",
    "check_size",
    "check_spec",
    "grid_for",
    "longest_edge_for_max_tiles",
    "pixel_values",
    "prepare",
    "resize_steps",
]

_LARGEST = 1e6
"""More than any scale or mean of pixels is, and small enough for every step in float32."""


def prepare(image: Pixels, spec: Preprocess) -> Tiles:
    """Makes tiles of a picture: see `split_picture` and `square_picture` for the kinds.

    Args:
        image: The picture.
        spec: The model's way of preprocessing.

    Shapes:
        image uint8[H, W, 3] -> pixels uint8[G, 3, tile, tile]

    Raises:
        ImageError: If the array is not a picture or is too large.
        ConfigError: If `spec` holds impossible numbers.
    """
    check_pixels(image)
    if isinstance(spec, SquarePreprocess):
        return square_picture(image, spec)
    return split_picture(image, spec)


def grid_for(height: int, width: int, spec: Preprocess) -> tuple[int, int]:
    """The rows and columns of tiles a picture becomes, without touching a pixel.

    Args:
        height: Height of the picture, in pixels.
        width: Width of the picture, in pixels.
        spec: The model's way of preprocessing.

    Returns:
        Rows and columns, both 0 where the picture becomes one tile.

    Raises:
        ImageError: If the picture is empty or too large.
        ConfigError: If `spec` holds impossible numbers.
    """
    if isinstance(spec, SquarePreprocess):
        check_size(height, width)
        check_square(spec)
        return 0, 0
    return tile_grid(height, width, spec)


def check_spec(spec: Preprocess) -> None:
    """Refuses numbers that no picture can be made with.

    Raises:
        ConfigError: A size, a colour or a number of the normalisation is out of range.
    """
    if isinstance(spec, SquarePreprocess):
        check_square(spec)
    else:
        check_tile_sizes(spec)
    scales = (spec.rescale, *spec.std)
    if not all(1 / _LARGEST <= scale <= _LARGEST for scale in scales):
        raise ConfigError(
            "impossible preprocessing",
            got=f"rescale {spec.rescale}, std {list(spec.std)}",
            wanted="positive numbers",
        )
    if not all(math.isfinite(mean) and abs(mean) <= _LARGEST for mean in spec.mean):
        raise ConfigError(
            "impossible preprocessing", got=f"mean {list(spec.mean)}", wanted="finite numbers"
        )


def pixel_values(pixels: Pixels, spec: Preprocess) -> npt.NDArray[np.float32]:
    """What the vision encoder computes from its tiles before the first layer.

    Args:
        pixels: Tiles.
        spec: The model's way of preprocessing.

    Shapes:
        pixels uint8[..., 3, H, W] -> float32[..., 3, H, W]

    Source: transformers 5.23, image_transforms.rescale (in float64, then cast to float32) and
        normalize (in float32).
    """
    scaled = (np.arange(256, dtype=np.float64) * spec.rescale).astype(np.float32)
    out = np.empty(pixels.shape, np.float32)
    for channel in range(3):
        mean, std = np.float32(spec.mean[channel]), np.float32(spec.std[channel])
        out[..., channel, :, :] = ((scaled - mean) / std)[pixels[..., channel, :, :]]
    return out
