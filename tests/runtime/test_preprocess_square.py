"""Square tiles against Pillow, transformers' image processors and recorded answers of theirs."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from lorgnette.errors import ConfigError, ImageError
from lorgnette.runtime import preprocess_square
from lorgnette.runtime.image import load_image
from lorgnette.runtime.preprocess import MAX_SIDE, check_spec, grid_for, pixel_values, prepare
from lorgnette.runtime.resample import Filter, Pixels, coefficients
from lorgnette.spec import SquarePreprocess
from tests.runtime.support import GOLDEN, shared_data

RESAMPLE = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
VECTORS = json.loads((GOLDEN / "preprocess_square_vectors.json").read_text(encoding="utf-8"))
COMMITTED = {
    "skimage_chelsea.png": "preprocess_chelsea.png",
    "skimage_clock_motion.png": "preprocess_clock_motion.png",
    "skimage_text.png": "preprocess_text.png",
}
MOBILEVLM = SquarePreprocess(
    tile_size=336,
    fit="pad",
    background=(122, 116, 104),
    resample="bicubic",
    rescale=1 / 255,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
OMNIVLM = SquarePreprocess(
    tile_size=384,
    fit="stretch",
    background=(0, 0, 0),
    resample="bicubic",
    rescale=1 / 255,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
PUBLISHED: dict[Literal["pad", "stretch"], SquarePreprocess] = {
    "pad": MOBILEVLM,
    "stretch": OMNIVLM,
}


def noise(height: int, width: int) -> Pixels:
    random = np.random.default_rng(height * 10_000 + width)
    return random.integers(0, 256, (height, width, 3), dtype=np.uint8)


def padded(image: Pixels, background: tuple[int, int, int]) -> Image.Image:
    """expand2square, by Pillow."""
    height, width = image.shape[:2]
    side = max(height, width)
    square = Image.new("RGB", (side, side), background)
    square.paste(Image.fromarray(image), ((side - width) // 2, (side - height) // 2))
    return square


def by_pillow(image: Pixels, spec: SquarePreprocess) -> Pixels:
    """The oracle of the pixels."""
    whole = padded(image, spec.background) if spec.fit == "pad" else Image.fromarray(image)
    tile = whole.resize((spec.tile_size, spec.tile_size), RESAMPLE[spec.resample])
    return np.asarray(tile).transpose(2, 0, 1)


def by_transformers(image: Pixels, spec: SquarePreprocess) -> Any:
    """The oracle of the pixel values, at the sizes of any tile."""
    side = spec.tile_size
    if spec.fit == "pad":
        processor: Any = CLIPImageProcessorPil(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_mean=list(spec.mean),
            image_std=list(spec.std),
        )
        return processor(images=padded(image, spec.background), return_tensors="np").pixel_values
    processor = SiglipImageProcessorPil(size={"height": side, "width": side})
    return processor(images=Image.fromarray(image), return_tensors="np").pixel_values


SIDES = st.integers(1, 80) | st.sampled_from([1, 2, 31, 32, 33, 64, 333])


@settings(max_examples=300, deadline=None)
@given(
    SIDES,
    SIDES,
    st.sampled_from([1, 2, 7, 32, 33, 100]),
    st.sampled_from(["pad", "stretch"]),
    st.sampled_from(list(RESAMPLE)),
    st.tuples(*[st.integers(0, 255)] * 3),
)
@example(32, 32, 32, "pad", "bicubic", (1, 2, 3))  # nothing to do
@example(20, 32, 32, "pad", "bicubic", (1, 2, 3))  # padded and not resized
@example(32, 20, 32, "pad", "bicubic", (1, 2, 3))
@example(6, 7, 32, "pad", "bicubic", (1, 2, 3))  # an odd line of padding
@example(7, 6, 32, "pad", "bicubic", (1, 2, 3))
@example(1, 333, 1, "pad", "lanczos", (255, 255, 255))
@example(333, 1, 1, "pad", "lanczos", (255, 255, 255))
@example(501, 5, 7, "stretch", "bicubic", (0, 0, 0))  # over 100 times taller than wide
@example(501, 5, 7, "pad", "bicubic", (0, 9, 255))
def test_equals_pillow(
    height: int,
    width: int,
    tile: int,
    fit: Literal["pad", "stretch"],
    filter: Filter,
    background: tuple[int, int, int],
) -> None:
    spec = msgspec.structs.replace(
        MOBILEVLM, tile_size=tile, fit=fit, resample=filter, background=background
    )
    image = noise(height, width)
    tiles = prepare(image, spec)
    assert (tiles.rows, tiles.cols) == grid_for(height, width, spec) == (0, 0)
    assert tiles.pixels.dtype == np.uint8
    assert tiles.pixels.flags.c_contiguous
    assert tiles.pixels.shape == (1, 3, tile, tile)
    assert np.array_equal(tiles.pixels[0], by_pillow(image, spec))


@pytest.mark.parametrize("fit", PUBLISHED)
@pytest.mark.parametrize(
    "size", [(427, 640), (640, 427), (1, 1), (336, 336), (3000, 11), (11, 3000), (1500, 2000)]
)
def test_pixel_values_equal_the_reference(
    size: tuple[int, int], fit: Literal["pad", "stretch"]
) -> None:
    image, spec = noise(*size), PUBLISHED[fit]
    got, wanted = pixel_values(prepare(image, spec).pixels, spec), by_transformers(image, spec)
    assert got.dtype == wanted.dtype == np.float32
    assert np.array_equal(got, wanted)


@pytest.mark.parametrize("fit", PUBLISHED)
@pytest.mark.parametrize("row", VECTORS["rows"], ids=lambda row: row["picture"])
def test_recorded_answers(row: dict[str, Any], fit: Literal["pad", "stretch"]) -> None:
    name, spec, wanted = row["picture"], PUBLISHED[fit], row[fit]
    path = GOLDEN / COMMITTED[name] if name in COMMITTED else shared_data(f"images/{name}")
    image = load_image(path)
    assert image.shape == (row["height"], row["width"], 3)
    values = pixel_values(prepare(image, spec).pixels, spec)[0]
    assert list(values.shape) == wanted["shape"]
    assert (float(values.mean()), float(values.std())) == (wanted["mean"], wanted["std"])
    middle = values[1, spec.tile_size // 2, 100:108]
    np.testing.assert_allclose(values[0, 0, :8], wanted["first8"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(middle, wanted["mid8"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 50])
def test_strips_do_not_show(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = msgspec.structs.replace(MOBILEVLM, tile_size=32)
    monkeypatch.setattr(preprocess_square, "_PADDED_BYTES", rows * 3 * 97)
    for image in (noise(97, 40), noise(40, 97)):
        assert np.array_equal(prepare(image, spec).pixels[0], by_pillow(image, spec))


@pytest.mark.parametrize("filter", RESAMPLE)
@pytest.mark.parametrize("tile", [1, 2, 3, 5, 336, 384, 4096])
def test_padding_keeps_its_colour_at_the_largest_sides(filter: Filter, tile: int) -> None:
    """What the padding relies on: weights that sum to one within what rounding takes off."""
    for side in (1, 2, tile + 1, 5000, MAX_SIDE - 1, MAX_SIDE):
        total = coefficients(side, tile, filter)[1].sum(axis=1)
        assert np.abs(255 * (total - (1 << 22))).max() < 1 << 21


@pytest.mark.parametrize("size", [(9000, 40), (40, 9000)])
def test_the_padded_square_is_never_made(size: tuple[int, int]) -> None:
    """A square of 9000 pixels would be 243 MB."""
    image = np.full((*size, 3), 7, np.uint8)
    tracemalloc.start()
    try:
        tile = prepare(image, MOBILEVLM).pixels[0]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50e6
    assert tile[:, 0, 0].tolist() == tile[:, -1, -1].tolist() == list(MOBILEVLM.background)
    assert (tile[:, 168, 168] != tile[:, 0, 0]).all()


LIES: list[dict[str, Any]] = [
    {"tile_size": 0},
    {"tile_size": -1},
    {"tile_size": 1_000_000},
    {"background": (0, 0, 256)},
    {"background": (-1, 0, 0)},
]
NUMBERS: list[dict[str, Any]] = [
    {"std": (0.5, 0.0, 0.5)},
    {"std": (0.5, -1.0, 0.5)},
    {"std": (float("nan"), 1.0, 1.0)},
    {"mean": (float("nan"), 0.0, 0.0)},
    {"mean": (0.0, float("inf"), 0.0)},
    {"rescale": 0.0},
    {"rescale": float("inf")},
    {"rescale": float("nan")},
]


@pytest.mark.parametrize("lie", LIES)
def test_refuses_impossible_specifications(lie: dict[str, Any]) -> None:
    spec = msgspec.structs.replace(MOBILEVLM, **lie)
    for call in (
        lambda: prepare(noise(4, 5), spec),
        lambda: grid_for(4, 5, spec),
        lambda: check_spec(spec),
    ):
        with pytest.raises(ConfigError, match="impossible preprocessing"):
            call()


@pytest.mark.parametrize("lie", NUMBERS)
def test_refuses_impossible_normalisation(lie: dict[str, Any]) -> None:
    for published in PUBLISHED.values():
        check_spec(published)
        with pytest.raises(ConfigError, match="impossible preprocessing"):
            check_spec(msgspec.structs.replace(published, **lie))


def test_refuses_pictures_as_the_tile_kind_does() -> None:
    with pytest.raises(ImageError, match="empty picture"):
        prepare(np.zeros((0, 5, 3), np.uint8), MOBILEVLM)
    with pytest.raises(ImageError, match="too large"):
        grid_for(1, MAX_SIDE + 1, OMNIVLM)
    with pytest.raises(ImageError, match="not a picture"):
        prepare(np.zeros((5, 5), np.uint8), OMNIVLM)
