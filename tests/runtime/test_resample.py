"""Resampling against Pillow itself: every byte equal."""

from __future__ import annotations

import numpy as np
import PIL
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from lorgnette.errors import ImageError, RequestError
from lorgnette.runtime import resample
from lorgnette.runtime.resample import Filter, Pixels, coefficients, resize, resize_planes

FILTERS: dict[Filter, Image.Resampling] = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
SIDES = st.integers(1, 70) | st.sampled_from([1, 2, 3, 96, 128, 255, 384, 512])


def noise(height: int, width: int, seed: int, values: int = 256) -> Pixels:
    """uint8[height, width, 3] of `values` evenly spread levels; two of them overshoot most."""
    levels = np.random.default_rng(seed).integers(0, values, (height, width, 3))
    return (levels * (255 // (values - 1))).astype(np.uint8)


def by_pillow(image: Pixels, height: int, width: int, filter: Filter) -> Pixels:
    """The oracle."""
    return np.asarray(Image.fromarray(image).resize((width, height), FILTERS[filter]))


def test_pillow_is_one_that_orders_the_passes_as_the_contract_says() -> None:
    major, minor = map(int, PIL.__version__.split(".")[:2])
    assert (12, 2) <= (major, minor) < (13, 0)


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from(list(FILTERS)), st.sampled_from([2, 256]))
@example(64, 64, 32, 32, "bilinear", 256)  # sums that lie exactly between two bytes
@example(40, 60, 40, 60, "lanczos", 256)  # nothing to do
@example(40, 60, 40, 31, "lanczos", 256)  # one pass only
@example(40, 60, 31, 60, "lanczos", 256)
@example(1, 1, 33, 47, "bicubic", 256)
@example(501, 5, 500, 7, "lanczos", 256)  # over 100 times taller than wide, made lower
@example(501, 5, 502, 7, "lanczos", 256)  # ... made taller
@example(500, 5, 400, 7, "lanczos", 256)  # exactly 100 times
def test_equals_pillow(h: int, w: int, height: int, width: int, filter: Filter, n: int) -> None:
    image = noise(h, w, seed=h * 1000 + w, values=n)
    wanted = by_pillow(image, height, width, filter)
    assert np.array_equal(resize(image, height, width, filter), wanted)


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((427, 640), (1366, 2048)),
        ((683, 1024), (512, 512)),
        ((1, 5000), (2, 700)),
        ((5000, 1), (700, 2)),
        ((3000, 20), (100, 40)),
        ((2, 2), (1500, 1500)),
        ((900, 1100), (1, 1)),
    ],
)
def test_equals_pillow_at_full_sizes(
    source: tuple[int, int], target: tuple[int, int], filter: Filter
) -> None:
    image = noise(*source, seed=7)
    assert np.array_equal(resize(image, *target, filter), by_pillow(image, *target, filter))


@pytest.mark.parametrize("source", [(97, 203), (203, 97), (1201, 10)])
def test_strips_change_nothing(source: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    image = noise(*source, seed=3)
    for target in ((150, 90), (40, 300)):
        whole = by_pillow(image, *target, "lanczos")
        for strip in (1, 5_000, 40_000):
            monkeypatch.setattr(resample, "STRIP_BYTES", strip)
            assert np.array_equal(resize(image, *target, "lanczos"), whole)


def test_planes_of_any_strides_and_the_result_is_a_new_array() -> None:
    image = noise(50, 41, seed=4)
    planes = image.transpose(0, 2, 1)
    for size in ((50, 41), (50, 20), (20, 41), (20, 20)):
        wanted = by_pillow(image, *size, "lanczos").transpose(0, 2, 1)
        for source in (planes, np.ascontiguousarray(planes), np.asfortranarray(planes)):
            got = resize_planes(source, *size, "lanczos")
            assert np.array_equal(got, wanted)
            assert not np.shares_memory(got, source)
    half = image[::2, ::-1]
    wanted = by_pillow(np.ascontiguousarray(half), 17, 60, "lanczos")
    assert np.array_equal(resize(half, 17, 60, "lanczos"), wanted)


@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from(list(FILTERS)))
@settings(max_examples=100, deadline=None)
def test_weights_sum_to_one_and_stay_inside(source: int, target: int, filter: Filter) -> None:
    first, weights = coefficients(source, target, filter)
    one = 1 << resample.PRECISION_BITS
    assert np.abs(weights.sum(axis=1) - one).max() <= weights.shape[1]
    last = first + weights.shape[1] - 1 - np.argmax(weights[:, ::-1] != 0, axis=1)
    assert first.min() >= 0
    assert last.max() < source
    # Sums must fit Pillow's 32 bits, or it would wrap where this code does not.
    assert np.abs(weights).sum(axis=1).max() * 255 < 1 << 31


def test_a_flat_picture_stays_flat() -> None:
    for value in (0, 1, 127, 254, 255):
        image = np.full((37, 53, 3), value, np.uint8)
        assert (resize(image, 91, 20, "lanczos") == value).all()


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 0, 3), np.uint8),
    ],
)
def test_refuses_what_is_no_picture(image: Pixels) -> None:
    with pytest.raises(ImageError, match=r"wanted uint8\[H, W, 3\]"):
        resize(image, 4, 4, "lanczos")


def test_refuses_impossible_requests() -> None:
    image = noise(4, 4, seed=0)
    with pytest.raises(RequestError, match="got 0 x 4"):
        resize(image, 0, 4, "lanczos")
    with pytest.raises(RequestError, match="got 4 x -1"):
        resize(image, 4, -1, "lanczos")
    with pytest.raises(RequestError, match="got 'nearest', wanted lanczos or bicubic or bilinear"):
        resize(image, 4, 4, "nearest")  # type: ignore[arg-type]
