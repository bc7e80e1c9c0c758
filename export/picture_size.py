"""What a recipe may say of the size of pictures, for the kinds of preprocessing."""

from __future__ import annotations

import msgspec

from lorgnette.errors import ConfigError
from lorgnette.recipe import Recipe
from lorgnette.runtime.preprocess import longest_edge_for_max_tiles
from lorgnette.spec import SquarePreprocess, TilePreprocess


def choose_tiling(published: TilePreprocess, recipe: Recipe) -> TilePreprocess:
    """The preprocessing with the recipe's picture size.

    Raises:
        ConfigError: The size is out of range, or said twice.
    """
    edge = recipe.longest_edge
    if edge is not None and recipe.max_tiles is not None:
        raise ConfigError("longest_edge and max_tiles say the same thing", hint="give one of them")
    if recipe.max_tiles is not None:
        edge = longest_edge_for_max_tiles(
            recipe.max_tiles, published.tile_size, published.longest_edge
        )
    edge = edge or published.longest_edge
    if not published.tile_size <= edge <= 4096:
        raise ConfigError(
            "longest_edge is out of range",
            got=edge,
            wanted=f"{published.tile_size} to 4096 pixels",
        )
    split = published.split if recipe.split is None else recipe.split
    return msgspec.structs.replace(published, longest_edge=edge, split=split)


def keep_square(published: SquarePreprocess, recipe: Recipe) -> SquarePreprocess:
    """The preprocessing as it is: a recipe has nothing to choose about a single tile.

    Raises:
        ConfigError: The recipe asks for tiles or another size.
    """
    for key in ("longest_edge", "max_tiles", "split"):
        value = getattr(recipe, key)
        harmless = value is None or (key, value) in (("max_tiles", 1), ("split", False))
        if not harmless:
            raise ConfigError(
                f"{key} has no meaning for this family",
                got=value,
                wanted=f"every picture as one tile of {published.tile_size} pixels",
            )
    return published
