"""SmolVLM's preprocessing: many tiles of one picture, and a thumbnail.

Source: transformers 5.23, Idefics3ImageProcessorPil and SmolVLMImageProcessorPil (the same
    steps in both), whose sizes depend on float64 divisions: the order of operations is theirs.
"""

from __future__ import annotations

import math

import numpy as np

from lorgnette.errors import ConfigError, RequestError
from lorgnette.runtime.resample import Pixels, resize_planes
from lorgnette.runtime.tiles import MAX_TILE_SIZE, Tiles, check_size
from lorgnette.spec import TilePreprocess

_MAX_RESIZED = 4096
"""The reference never resizes the longest side beyond this before tiling."""


def split_picture(image: Pixels, spec: TilePreprocess) -> Tiles:
    """Resizes a picture, rounds it up to whole tiles, splits it and adds a thumbnail.

    The thumbnail is made of the picture as rounded to tiles, so its aspect is the tiles' one.

    Args:
        image: The picture, checked.
        spec: The model's way of preprocessing.

    Shapes:
        image uint8[H, W, 3] -> pixels uint8[G, 3, tile, tile]

    Raises:
        ConfigError: If `spec` holds impossible sizes.
    """
    tile = spec.tile_size
    planes = image.transpose(0, 2, 1)
    for size in resize_steps(image.shape[0], image.shape[1], spec):
        if size != (len(planes), planes.shape[2]):
            planes = resize_planes(planes, *size, spec.resample)
    rows, cols = len(planes) // tile, planes.shape[2] // tile
    if rows * cols == 1:
        return Tiles(np.ascontiguousarray(planes.transpose(1, 0, 2))[np.newaxis], 0, 0)
    pixels = np.empty((rows * cols + 1, 3, tile, tile), np.uint8)
    grid = planes.reshape(rows, tile, 3, cols, tile).transpose(0, 3, 2, 1, 4)
    pixels[:-1].reshape(rows, cols, 3, tile, tile)[:] = grid
    pixels[-1] = resize_planes(planes, tile, tile, spec.resample).transpose(1, 0, 2)
    return Tiles(pixels, rows, cols)


def tile_grid(height: int, width: int, spec: TilePreprocess) -> tuple[int, int]:
    """Rows and columns of tiles, both 0 where the picture becomes one tile.

    Raises:
        ImageError: If the picture is empty or too large.
        ConfigError: If `spec` holds impossible sizes.
    """
    height, width = resize_steps(height, width, spec)[-1]
    rows, cols = height // spec.tile_size, width // spec.tile_size
    return (0, 0) if rows * cols == 1 else (rows, cols)


def resize_steps(height: int, width: int, spec: TilePreprocess) -> list[tuple[int, int]]:
    """The heights and widths a picture is resized to, one after the other, before it is split.

    Args:
        height: Height of the picture, in pixels.
        width: Width of the picture, in pixels.
        spec: The model's way of preprocessing.

    Raises:
        ImageError: If the picture is empty or too large.
        ConfigError: If `spec` holds impossible sizes.
    """
    check_size(height, width)
    check_tile_sizes(spec)
    resized = _longest_edge_size(height, width, spec.longest_edge)
    tile = spec.tile_size
    return [resized, _whole_tiles(*resized, tile) if spec.split else (tile, tile)]


def check_tile_sizes(spec: TilePreprocess) -> None:
    """Refuses sizes that would fill the memory: a bundle comes from anywhere.

    Raises:
        ConfigError: If a size is out of range.
    """
    tile = spec.tile_size
    if not 1 <= tile <= MAX_TILE_SIZE or spec.longest_edge < 1:
        raise ConfigError(
            "impossible preprocessing",
            got=f"tile size {tile}, longest edge {spec.longest_edge}",
            wanted=f"a tile size of 1 to {MAX_TILE_SIZE} and a longest edge of at least 1",
        )


def longest_edge_for_max_tiles(max_tiles: int, tile_size: int, published_longest_edge: int) -> int:
    """The largest longest edge that never makes more tiles than wanted, thumbnail included.

    A longest edge of k tiles makes at most k * k + 1 of them (1 where k is 1), for a square. An
    odd number of pixels makes room for k + 1 rows, because the reference makes the short side
    even after it has made the long one.

    Args:
        max_tiles: Most tiles of one picture, at least 1.
        tile_size: Side of a tile, in pixels.
        published_longest_edge: The longest edge the model was trained with, in pixels.

    Returns:
        A multiple of `tile_size`, at most `published_longest_edge`.

    Raises:
        RequestError: If not even the smallest edge keeps to `max_tiles`.
        ConfigError: If `published_longest_edge` is less than one tile.
    """
    if max_tiles < 1:
        raise RequestError("cannot limit the tiles of a picture", got=max_tiles, wanted="1 or more")
    if not 1 <= tile_size <= published_longest_edge:
        raise ConfigError(
            "longest edge and tile size do not fit",
            got=f"longest edge {published_longest_edge}, tile size {tile_size}",
            wanted="a longest edge of at least one tile",
        )
    for count in range(published_longest_edge // tile_size, 0, -1):
        edge = count * tile_size
        side = count + edge % 2
        if (side * side + 1 if side > 1 else 1) <= max_tiles:
            return edge
    raise RequestError(
        "cannot limit the tiles of a picture", got=max_tiles, wanted="5 or more for odd tile sizes"
    )


def _longest_edge_size(height: int, width: int, longest_edge: int) -> tuple[int, int]:
    """Height and width with the longest side of `longest_edge`, the other one made even.

    Source: get_resize_output_image_size of both image processors.
    """
    aspect = width / height
    if width >= height:
        width, height = longest_edge, int(longest_edge / aspect)
        height += height % 2
    else:
        width, height = int(longest_edge * aspect), longest_edge
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    aspect = width / height
    if width >= height and width > _MAX_RESIZED:
        width, height = _MAX_RESIZED, int(_MAX_RESIZED / aspect)
    elif height > width and height > _MAX_RESIZED:
        width, height = int(_MAX_RESIZED * aspect), _MAX_RESIZED
    return max(height, 1), max(width, 1)


def _whole_tiles(height: int, width: int, tile: int) -> tuple[int, int]:
    """Height and width rounded up to whole tiles, the long side first.

    Source: resize_for_vision_encoder of both image processors.
    """
    aspect = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / aspect) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * aspect) / tile) * tile
    return height, width
