"""Every distinct picture is encoded once, in calls of a few tiles, and the oldest are forgotten."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorgnette.runtime import pictures as pictures_module
from lorgnette.runtime.engines.engine import Float
from lorgnette.runtime.model import Model
from lorgnette.runtime.pictures import (
    EncodedPicture,
    PictureCache,
    PictureSource,
    content_key,
    encode_picture,
)
from lorgnette.runtime.preprocess import Tiles, prepare
from tests.runtime.support import FakeEngine, fake_model, picture


@pytest.fixture
def fresh(fp32: Path) -> tuple[Model, FakeEngine]:
    """A model that has seen nothing, and its engine, which stops at once."""
    engine = FakeEngine(lambda _: stop)
    model = fake_model(fp32, engine)
    stop = model.manifest.prompt.stop_token_ids[0]
    return model, engine


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def nothing() -> None:
    """A check that never stops."""


def test_a_picture_is_the_same_in_every_form(
    fresh: tuple[Model, FakeEngine], tmp_path: Path
) -> None:
    model, engine = fresh
    pixels = picture(30, 50)
    path = tmp_path / "picture.bmp"
    Image.fromarray(pixels).save(path)
    first = model.generate(pixels, "x").result()
    assert first.tiles > 1
    calls = len(engine.tiles)
    forms: list[PictureSource] = [
        pixels.copy(),
        np.asfortranarray(pixels),
        Image.fromarray(pixels),
        Image.fromarray(pixels).convert("RGBA"),
        png(pixels),
        path,
        str(path),
    ]
    for form in forms:
        again = model.generate(form, "something else").result()
        assert (again.tiles, again.image_tokens) == (0, first.image_tokens)
    assert len(engine.tiles) == calls


def test_one_other_pixel_is_another_picture(fresh: tuple[Model, FakeEngine]) -> None:
    model, _ = fresh
    pixels = picture(64, 64)
    model.generate(pixels, "x").result()
    pixels[40, 40] ^= 255
    assert model.generate(pixels, "x").result().tiles > 0


def test_the_same_picture_twice_in_one_question_is_encoded_once(
    fresh: tuple[Model, FakeEngine],
) -> None:
    model, engine = fresh
    one = model.generate([picture(9, 9)], "x").result()
    two = model.generate([picture(20, 9), picture(9, 9), picture(20, 9)], "x").result()
    assert two.image_tokens > 2 * one.image_tokens
    assert sum(engine.tiles) == one.tiles + two.tiles
    assert two.tiles == len(prepare(picture(20, 9), model.manifest.preprocess).pixels)


@pytest.mark.parametrize(("together", "calls"), [(1, 5), (2, 3), (4, 2), (5, 1), (9, 1)])
def test_tiles_go_in_calls_of_a_few_and_in_order(
    model: Model, monkeypatch: pytest.MonkeyPatch, together: int, calls: int
) -> None:
    monkeypatch.setattr(pictures_module, "TILES_PER_CALL", together)
    tiles = prepare(picture(60, 90), model.manifest.preprocess)
    assert len(tiles.pixels) == 5
    checks: list[int] = []
    got, fresh = encode_picture(
        model.engine, tiles, PictureCache(), lambda: checks.append(len(checks))
    )
    assert fresh
    assert len(checks) == calls
    # One tile at a time is another order of float32 sums, nothing more.
    wanted = np.concatenate([model.engine.encode(tile[None])[0] for tile in tiles.pixels])
    np.testing.assert_allclose(got.tokens, wanted, rtol=1e-4, atol=1e-5)
    assert (got.rows, got.cols) == (tiles.rows, tiles.cols)


def test_a_failed_picture_is_not_kept(fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures_module, "TILES_PER_CALL", 4)
    engine = FakeEngine(lambda _: 0)
    model = fake_model(fp32, engine)
    tiles = prepare(picture(60, 60), model.manifest.preprocess)

    def fail(count: int) -> None:
        if count == 2:
            raise RuntimeError("second call")

    engine.on_encode = fail
    cache = PictureCache()
    with pytest.raises(RuntimeError):
        encode_picture(engine, tiles, cache, nothing)
    assert encode_picture(engine, tiles, cache, nothing)[1]
    assert not encode_picture(engine, tiles, cache, nothing)[1]


def held_picture(kilobytes: int) -> EncodedPicture:
    return EncodedPicture(np.zeros((kilobytes, 256), np.float32), 0, 0)


def test_the_least_recently_used_go_first() -> None:
    cache = PictureCache(limit_bytes=3 * 1024)
    for key in (b"a", b"b", b"c"):
        cache.put(key, held_picture(1))
    assert cache.get(b"a") is not None
    cache.put(b"d", held_picture(1))
    assert [key for key in (b"a", b"b", b"c", b"d") if cache.get(key)] == [b"a", b"c", b"d"]
    cache.put(b"e", held_picture(2))
    assert [key for key in (b"a", b"c", b"d", b"e") if cache.get(key)] == [b"d", b"e"]


def test_a_picture_over_the_limit_is_kept_alone() -> None:
    cache = PictureCache(limit_bytes=1024)
    cache.put(b"a", held_picture(1))
    cache.put(b"b", held_picture(9))
    assert cache.get(b"a") is None
    assert cache.get(b"b") is not None
    cache.put(b"c", held_picture(1))
    assert cache.get(b"b") is None
    assert cache.get(b"c") is not None


def test_putting_a_picture_again_costs_nothing() -> None:
    cache = PictureCache(limit_bytes=2 * 1024)
    for key in (b"a", b"b", b"b", b"b"):
        cache.put(key, held_picture(1))
    assert cache.get(b"a") is not None


def test_the_grid_is_part_of_the_content() -> None:
    pixels = np.zeros((3, 3, 8, 8), np.uint8)
    assert content_key(Tiles(pixels, 1, 2)) != content_key(Tiles(pixels, 2, 1))
    assert content_key(Tiles(pixels, 1, 2)) == content_key(Tiles(pixels.copy(), 1, 2))


def test_a_cache_serves_several_threads(fp32: Path) -> None:
    engine = FakeEngine(lambda _: 0)
    model = fake_model(fp32, engine)
    many = [prepare(picture(9, 9, seed=i), model.manifest.preprocess) for i in range(4)]
    wanted = [encode_picture(engine, tiles, PictureCache(), nothing)[0].tokens for tiles in many]
    # Room for two, so that pictures come and go while others ask for them.
    cache = PictureCache(limit_bytes=2 * wanted[0].nbytes)
    got: list[tuple[int, Float]] = []

    def work(start: int) -> None:
        for i in range(start, start + 40):
            found, _ = encode_picture(engine, many[i % 4], cache, nothing)
            got.append((i % 4, found.tokens))

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 160
    assert all(np.array_equal(tokens, wanted[i]) for i, tokens in got)
