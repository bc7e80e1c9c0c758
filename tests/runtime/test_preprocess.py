"""Tiles against transformers' image processors and against recorded answers of theirs."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from lorgnette.errors import ConfigError, ImageError, RequestError
from lorgnette.runtime.image import load_image
from lorgnette.runtime.preprocess import (
    MAX_PIXELS,
    MAX_SIDE,
    check_size,
    grid_for,
    longest_edge_for_max_tiles,
    pixel_values,
    prepare,
)
from lorgnette.runtime.resample import Filter, Pixels
from lorgnette.spec import TilePreprocess

GOLDEN = Path(__file__).parents[1] / "golden"
VECTORS = json.loads((GOLDEN / "preprocess_vectors.json").read_text(encoding="utf-8"))["vectors"]
RESAMPLE = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
HALF = (0.5, 0.5, 0.5)


def spec_of(
    tile: int, longest_edge: int, split: bool = True, resample: Filter = "lanczos"
) -> TilePreprocess:
    """A specification normalised as the published models are."""
    return TilePreprocess(
        tile_size=tile,
        longest_edge=longest_edge,
        split=split,
        resample=resample,
        rescale=1 / 255,
        mean=HALF,
        std=HALF,
    )


def reference(image: Pixels, spec: TilePreprocess, smolvlm: bool = False) -> Any:
    """The oracle's whole answer: pixel_values, rows, cols."""
    kind = SmolVLMImageProcessorPil if smolvlm else Idefics3ImageProcessorPil
    processor = kind(
        size={"longest_edge": spec.longest_edge},
        max_image_size={"longest_edge": spec.tile_size},
        do_image_splitting=spec.split,
        resample=RESAMPLE[spec.resample],
        rescale_factor=spec.rescale,
        image_mean=list(spec.mean),
        image_std=list(spec.std),
        return_row_col_info=True,
    )
    return processor(images=[Image.fromarray(image)], return_tensors="np")


def assert_equal_to_reference(image: Pixels, spec: TilePreprocess, smolvlm: bool = False) -> None:
    answer = reference(image, spec, smolvlm)
    tiles = prepare(image, spec)
    assert (tiles.rows, tiles.cols) == (answer.rows[0][0], answer.cols[0][0])
    assert grid_for(image.shape[0], image.shape[1], spec) == (tiles.rows, tiles.cols)
    assert tiles.pixels.dtype == np.uint8
    assert tiles.pixels.flags.c_contiguous
    got = pixel_values(tiles.pixels, spec)
    wanted = np.asarray(answer.pixel_values[0])
    assert got.dtype == wanted.dtype == np.float32
    assert got.shape == wanted.shape
    assert np.array_equal(got, wanted)


def drawn(width: int, height: int) -> Pixels:
    """The picture that `tests/golden/preprocess_make.py` calls `drawn`, in Python's integers."""
    values = bytes((i * i * 2654435761 >> 16) & 255 for i in range(width * height * 3))
    return np.frombuffer(values, np.uint8).reshape(height, width, 3)


def noise(height: int, width: int) -> Pixels:
    random = np.random.default_rng(height * 10_000 + width)
    return random.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "vector",
    VECTORS,
    ids=lambda v: f"{v['picture']}-{v['tile_size']}-{v['longest_edge']}-{v['split']}",
)
def test_recorded_answers(vector: dict[str, Any]) -> None:
    name = vector["picture"]
    if name.startswith("drawn "):
        width, height = map(int, name.removeprefix("drawn ").split("x"))
        image = drawn(width, height)
    else:
        image = load_image(GOLDEN / name)
    spec = spec_of(vector["tile_size"], vector["longest_edge"], vector["split"])
    tiles = prepare(image, spec)
    middle = spec.tile_size // 2
    assert (tiles.rows, tiles.cols, len(tiles.pixels)) == (
        vector["rows"],
        vector["cols"],
        vector["tiles"],
    )
    assert tiles.pixels[0, 0, 0, :8].tolist() == vector["first8"]
    assert tiles.pixels[-1, 0, middle, middle : middle + 8].tolist() == vector["last_middle8"]
    assert hashlib.sha256(tiles.pixels.tobytes()).hexdigest() == vector["pixels_sha256"]


SIDES = st.integers(1, 90) | st.sampled_from([1, 2, 31, 32, 33, 64, 300])


@settings(max_examples=200, deadline=None)
@given(
    SIDES,
    SIDES,
    st.sampled_from([(32, 128), (32, 32), (16, 80), (24, 50), (32, 20), (7, 21), (27, 108)]),
    st.booleans(),
    st.sampled_from(list(RESAMPLE)),
    st.booleans(),
)
@example(32, 32, (32, 32), True, "lanczos", False)  # fits one tile as it is
@example(1, 300, (32, 128), True, "lanczos", False)
@example(300, 1, (32, 128), True, "lanczos", False)
@example(301, 3, (32, 128), True, "lanczos", True)
@example(2, 3, (24, 50), True, "lanczos", False)  # the short side is cut before it is rounded up
@example(3, 2, (24, 50), True, "lanczos", False)
@example(21, 21, (7, 21), True, "lanczos", False)  # odd square: one row more than columns
def test_equals_reference_at_small_tiles(
    height: int, width: int, sizes: tuple[int, int], split: bool, filter: Filter, smolvlm: bool
) -> None:
    spec = spec_of(*sizes, split=split, resample=filter)
    assert_equal_to_reference(noise(height, width), spec, smolvlm)


@pytest.mark.parametrize(
    ("size", "spec"),
    [
        ((427, 640), spec_of(512, 2048)),
        ((640, 427), spec_of(384, 1536)),
        ((300, 5000), spec_of(512, 2048)),
        ((5000, 300), spec_of(384, 1536)),
        ((1, 1), spec_of(512, 2048)),
        ((1, 5000), spec_of(384, 1536)),
        ((5000, 7), spec_of(512, 2048)),
        ((2000, 3000), spec_of(512, 512)),
        ((600, 800), spec_of(384, 1536, split=False)),
        ((300, 5000), spec_of(512, 2048, split=False)),
        ((90, 60), spec_of(364, 1456)),
    ],
)
def test_equals_reference_at_published_sizes(size: tuple[int, int], spec: TilePreprocess) -> None:
    assert_equal_to_reference(noise(*size), spec)


@pytest.mark.parametrize("size", [(10, 40), (40, 9), (1, 40)])
def test_longest_edge_is_capped_at_4096(size: tuple[int, int]) -> None:
    assert_equal_to_reference(noise(*size), spec_of(1024, 5000, resample="bilinear"))


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.sampled_from([(512, 2048), (384, 1536), (512, 1024), (364, 1456), (512, 9000), (13, 52)]),
)
def test_grid_equals_what_the_reference_predicts(
    height: int, width: int, sizes: tuple[int, int]
) -> None:
    tile, longest_edge = sizes
    if min(height, width) * 40 < max(height, width):
        return  # there the reference's prediction rounds unlike its own resizing
    processor = Idefics3ImageProcessorPil(
        size={"longest_edge": longest_edge}, max_image_size={"longest_edge": tile}
    )
    _, rows, cols = processor.get_number_of_image_patches(height, width)
    assert grid_for(height, width, spec_of(tile, longest_edge)) == (rows, cols)


def test_pixel_values_for_any_mean_and_std() -> None:
    spec = TilePreprocess(
        tile_size=32,
        longest_edge=64,
        split=True,
        resample="bicubic",
        rescale=0.00392156862745098,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    )
    assert_equal_to_reference(noise(50, 70), spec)
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(3, axis=0)
    close = (every / 255 - np.reshape(spec.mean, (3, 1, 1))) / np.reshape(spec.std, (3, 1, 1))
    np.testing.assert_allclose(pixel_values(every, spec), close, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tile", [7, 8, 16])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_no_picture_makes_more_tiles_than_bounded(tile: int, count: int) -> None:
    """Brute force: every picture up to 150 x 150."""
    edge = count * tile
    spec = spec_of(tile, edge)
    grids = {grid_for(h, w, spec) for h in range(1, 151) for w in range(1, 151)}
    most = max(rows * cols + 1 if rows else 1 for rows, cols in grids)
    assert longest_edge_for_max_tiles(most, tile, edge) == edge
    if most > 5:
        assert longest_edge_for_max_tiles(most - 1, tile, edge) < edge


@pytest.mark.parametrize(("tile", "published"), [(512, 2048), (384, 1536), (364, 1456)])
def test_bound_holds_for_all_aspects_of_the_published_models(tile: int, published: int) -> None:
    for max_tiles in range(1, 20):
        edge = longest_edge_for_max_tiles(max_tiles, tile, published)
        assert edge % tile == 0
        assert edge <= published
        spec = spec_of(tile, edge)
        for side in range(1, 5001, 7):
            for height, width in ((side, 5000), (5000, side)):
                rows, cols = grid_for(height, width, spec)
                assert max(1, rows * cols + (rows > 0)) <= max_tiles


def test_longest_edge_for_max_tiles_of_the_256m() -> None:
    edges = {n: longest_edge_for_max_tiles(n, 512, 2048) for n in (1, 4, 5, 9, 10, 16, 17, 99)}
    assert edges == {1: 512, 4: 512, 5: 1024, 9: 1024, 10: 1536, 16: 1536, 17: 2048, 99: 2048}
    assert longest_edge_for_max_tiles(17, 512, 2000) == 1536


def test_refuses_limits_that_cannot_be_kept() -> None:
    with pytest.raises(RequestError, match="got 0, wanted 1 or more"):
        longest_edge_for_max_tiles(0, 512, 2048)
    with pytest.raises(ConfigError, match="at least one tile"):
        longest_edge_for_max_tiles(4, 512, 511)
    with pytest.raises(ConfigError, match="at least one tile"):
        longest_edge_for_max_tiles(4, 0, 511)
    with pytest.raises(RequestError, match="wanted 5 or more"):
        longest_edge_for_max_tiles(4, 7, 7)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((0, 5, 3), np.uint8), "empty picture: got 5 x 0"),
        (np.zeros((5, 0, 3), np.uint8), "empty picture: got 0 x 5"),
        (np.zeros((5, 5), np.uint8), r"got uint8\[5, 5\], wanted uint8\[H, W, 3\]"),
        (np.zeros((5, 5, 4), np.uint8), r"got uint8\[5, 5, 4\]"),
        (np.zeros((5, 5, 3), np.float32), r"got float32\[5, 5, 3\]"),
        (np.broadcast_to(np.uint8(0), (MAX_SIDE + 1, 1, 3)), "too large: got 1 x 16385"),
        (np.broadcast_to(np.uint8(0), (8001, 8000, 3)), "too large: got 8000 x 8001"),
    ],
)
def test_refuses_what_is_no_picture(array: npt.NDArray[Any], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        prepare(array, spec_of(32, 64))


def test_sizes_at_the_limits() -> None:
    side = math.isqrt(MAX_PIXELS)
    check_size(side, side)
    check_size(1, MAX_SIDE)
    with pytest.raises(ImageError, match="in here: got"):
        check_size(side + 1, side + 1, "here")
    with pytest.raises(ImageError, match="empty picture"):
        grid_for(0, 1, spec_of(32, 64))


@pytest.mark.parametrize(("tile", "edge"), [(0, 64), (-1, 64), (5000, 64), (32, 0)])
def test_refuses_impossible_specifications(tile: int, edge: int) -> None:
    with pytest.raises(ConfigError, match="impossible preprocessing"):
        prepare(noise(4, 4), spec_of(tile, edge))
    with pytest.raises(ConfigError, match="impossible preprocessing"):
        grid_for(4, 4, spec_of(tile, edge))
