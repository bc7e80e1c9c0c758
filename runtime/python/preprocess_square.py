"""One tile of every picture: padded to a square, or stretched to one.

Source: `pad` is what LLaVA and MobileVLM call expand2square, done with Pillow, and then a resize;
    `stretch` is the resize alone, as in transformers 5.23, SiglipImageProcessorPil.
"""

from __future__ import annotations

import numpy as np

from lorgnette.errors import ConfigError
from lorgnette.runtime.resample import Pixels, resize_planes
from lorgnette.runtime.tiles import MAX_TILE_SIZE, Tiles
from lorgnette.spec import SquarePreprocess

_PADDED_BYTES = 8 << 20
"""Most bytes of rows that are padded at once."""


def square_picture(image: Pixels, spec: SquarePreprocess) -> Tiles:
    """Makes one tile of a picture.

    Args:
        image: The picture, checked.
        spec: The model's way of preprocessing.

    Shapes:
        image uint8[H, W, 3] -> pixels uint8[1, 3, tile, tile]

    Raises:
        ConfigError: If `spec` holds impossible numbers.
    """
    check_square(spec)
    tile = spec.tile_size
    planes = image.transpose(0, 2, 1)
    if spec.fit == "pad" and len(planes) != planes.shape[2]:
        planes = _pad_and_narrow(planes, spec)
    planes = resize_planes(planes, tile, tile, spec.resample)
    return Tiles(np.ascontiguousarray(planes.transpose(1, 0, 2))[np.newaxis], 0, 0)


def check_square(spec: SquarePreprocess) -> None:
    """Refuses numbers that no picture can be made with: a bundle comes from anywhere.

    Raises:
        ConfigError: If a number is out of range.
    """
    if not 1 <= spec.tile_size <= MAX_TILE_SIZE:
        raise ConfigError(
            "impossible preprocessing",
            got=f"tile size {spec.tile_size}",
            wanted=f"a tile size of 1 to {MAX_TILE_SIZE}",
        )
    if not all(0 <= value <= 255 for value in spec.background):
        raise ConfigError(
            "impossible preprocessing",
            got=f"background {list(spec.background)}",
            wanted="red, green and blue of 0 to 255",
        )


def _pad_and_narrow(planes: Pixels, spec: SquarePreprocess) -> Pixels:
    """The padded square behind the first of the two passes that resize it.

    The square itself is never made: a picture of 16000 x 10 pixels would fill 768 MB. The first
    pass is the horizontal one and works row by row, so that rows of the picture can be padded
    some at a time, and rows of padding need no work. Filtering them gives their colour c again:
    each of up to 2**14 weights is off by half a unit of 2**-22 at most, and c times the sum of
    that, 255 * 2**13, is less than the 2**21 that rounding takes off.

    Shapes:
        planes uint8[H, 3, W] -> uint8[side, 3, tile], side being the larger of H and W
    """
    height, _, width = planes.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    colour = np.array(spec.background, np.uint8)[:, None]
    narrow = np.empty((side, 3, spec.tile_size), np.uint8)
    narrow[:top] = narrow[top + height :] = colour
    step = max(1, _PADDED_BYTES // (3 * side))
    for start in range(0, height, step):
        rows = planes[start : start + step]
        if side > width:
            padded = np.empty((len(rows), 3, side), np.uint8)
            padded[:] = colour
            padded[:, :, left : left + width] = rows
            rows = padded
        end = start + len(rows)
        narrow[top + start : top + end] = _resize_rows(rows, spec)
    return narrow


def _resize_rows(rows: Pixels, spec: SquarePreprocess) -> Pixels:
    """The horizontal pass alone."""
    return resize_planes(rows, len(rows), spec.tile_size, spec.resample)
