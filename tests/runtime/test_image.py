"""Reading pictures: equal to transformers, and one clear line for all that is wrong."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import image_utils
from transformers.image_transforms import convert_to_rgb

from lorgnette.errors import ImageError
from lorgnette.runtime.image import FORMATS, load_image
from lorgnette.runtime.resample import Pixels

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F")
ORIENTATION = 0x0112


def noise(mode: str, height: int = 9, width: int = 7) -> Image.Image:
    """A random picture of any mode, half transparent where the mode can."""
    random = np.random.default_rng(5)
    if mode.startswith("I;16"):
        return Image.fromarray(random.integers(0, 65536, (height, width), dtype=np.uint16))
    image = Image.fromarray(random.integers(0, 256, (height, width, 4), dtype=np.uint8))
    image = image.convert({"PA": "LA"}.get(mode, "RGBA" if "A" in mode else "RGB"))
    return image.convert(mode)


def in_reference(image: Image.Image) -> Pixels:
    """The oracle."""
    return np.asarray(convert_to_rgb(image, return_numpy=True))


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A PNG with a header and almost no data."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 10)
    chunks = (header, data, b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks
    )


@pytest.mark.parametrize("mode", [*MODES, "I;16"])
def test_modes_become_rgb_as_in_the_reference(mode: str) -> None:
    image = noise(mode)
    got = load_image(image)
    assert got.dtype == np.uint8
    assert got.flags.c_contiguous
    assert np.array_equal(got, in_reference(image))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_png_files_become_rgb_as_in_the_reference(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(saved(noise(mode), "PNG"))
    wanted = in_reference(Image.open(path))
    assert np.array_equal(load_image(path), wanted)
    assert np.array_equal(load_image(str(path)), wanted)
    assert np.array_equal(load_image(path.read_bytes()), wanted)


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_one_transparent_colour_becomes_white(format: str) -> None:
    image = Image.new("P", (4, 3), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 1), 1)
    got = load_image(saved(image, format, transparency=0))
    assert got[0, 0].tolist() == [255, 255, 255]
    assert got[1, 1].tolist() == [200, 100, 50]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_turned_upright_and_pictures_are_not(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "picture.png"
    path.write_bytes(saved(noise("RGB"), "PNG", exif=exif))
    assert np.array_equal(load_image(path), np.asarray(image_utils.load_image(str(path))))
    with Image.open(path) as image:
        assert np.array_equal(load_image(image), in_reference(image))


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_read(format: str) -> None:
    data = saved(noise("RGB", 20, 30), format)
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(load_image(data), np.asarray(image.convert("RGB")))


def test_first_frame_of_several() -> None:
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue")]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(data)[0, 0].tolist() == [255, 0, 0]


def test_arrays_are_taken_as_they_are() -> None:
    array = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    assert np.array_equal(load_image(array), array)
    assert load_image(array[:, ::-1]).flags.c_contiguous


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((4, 5), np.uint8), "not a picture: got uint8[4, 5], wanted uint8[H, W, 3]"),
        (np.zeros((3, 4, 5), np.uint8), "not a picture: got uint8[3, 4, 5]"),
        (np.zeros((4, 5, 3), np.int64), "not a picture: got int64[4, 5, 3]"),
        (np.zeros((0, 5, 3), np.uint8), "empty picture: got 5 x 0 pixels"),
        (Image.new("RGB", (0, 5)), "empty picture: got 0 x 5 pixels"),
        (Image.new("1", (20_000, 1)), "picture too large: got 20000 x 1 pixels"),
        (Image.new("La", (2, 2)), "cannot decode the picture: got conversion from La to L"),
        (7, "not a picture: got int, wanted a path"),
        (b"", "empty file in the bytes given: got 0 bytes"),
        (b"hello, world", "not a picture in the bytes given: wanted one of PNG, JPEG"),
        (png_claiming(20_000, 20_000), "picture too large in the bytes given"),
        (png_claiming(16_385, 1), "picture too large in the bytes given: got 16385 x 1 pixels"),
        (png_claiming(8_001, 8_000), "picture too large in the bytes given: got 8001 x 8000"),
        (png_claiming(100, 100), "cannot decode the picture in the bytes given"),
        (saved(Image.new("RGB", (4, 4)), "ICO"), "not a picture in the bytes given"),
        (saved(Image.new("RGB", (4, 4)), "PDF"), "not a picture in the bytes given"),
        ("https://example.com/cat.png", "got no such file, wanted the path of a picture's file"),
        ("a\0b", "got no such file"),
        ("x" * 5000, "got File name too long"),
    ],
)
def test_refusals(source: Any, message: str) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(source)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refused_files(tmp_path: Path) -> None:
    empty, text, cut = (tmp_path / name for name in ("empty.png", "text.png", "cut.jpg"))
    empty.write_bytes(b"")
    text.write_text("not a picture at all\n" * 20)
    cut.write_bytes(saved(noise("RGB", 64, 64), "JPEG")[:-900])
    for path, message in (
        (tmp_path, "a directory"),
        (tmp_path / "missing.png", "no such file"),
        (empty, "empty file"),
        (text, "not a picture"),
        (cut, "truncated"),
    ):
        with pytest.raises(ImageError) as caught:
            load_image(path)
        assert message in str(caught.value)
        assert str(path) in str(caught.value)


def test_too_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorgnette.runtime.image.MAX_FILE_BYTES", 100)
    with pytest.raises(ImageError, match=r"file too large in the bytes given: got \d+ bytes"):
        load_image(saved(noise("RGB", 20, 20), "BMP"))


WHOLE_FILES = tuple(
    saved(noise(mode, 19, 23), format)
    for format, mode in (
        ("PNG", "RGB"),
        ("PNG", "P"),
        ("JPEG", "CMYK"),
        ("WEBP", "RGBA"),
        ("BMP", "L"),
        ("GIF", "P"),
        ("TIFF", "RGB"),
        ("PPM", "RGB"),
    )
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(WHOLE_FILES),
    st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), max_size=5),
    st.none() | st.integers(0, 400),
)
def test_damaged_files_are_read_or_refused(
    whole: bytes, changes: list[tuple[int, int]], cut: int | None
) -> None:
    data = bytearray(whole[:cut])
    for place, value in changes:
        if place < len(data):
            data[place] = value
    try:
        image = load_image(bytes(data))
    except ImageError:
        return
    assert image.dtype == np.uint8
    assert image.shape[2] == 3
