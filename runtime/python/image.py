"""From a file, its bytes or a Pillow picture to uint8 RGB.

Sizes are checked on the header, before a pixel is decoded, because a small file can claim a
picture that fills the memory.

Source: transformers 5.23. Transparency is laid over white as image_transforms.convert_to_rgb
    does it. Files are turned upright by their EXIF orientation as image_utils.load_image does it;
    a Pillow picture is taken as it is, as the image processors take it. (load_image also drops
    the transparency of a file instead of laying it over white; the image processors, given the
    opened file, do not. This module follows the image processors.)
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from lorgnette.errors import ImageError
from lorgnette.runtime.preprocess import check_pixels, check_size
from lorgnette.runtime.resample import Pixels

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""The formats that are read; the decoders of the others are never reached."""
MAX_FILE_BYTES = 256 << 20
"""Most bytes of a picture's file."""

_WHITE = (255, 255, 255, 255)


def load_image(source: str | Path | bytes | Image.Image | npt.NDArray[np.generic]) -> Pixels:
    """Reads a picture as RGB; of several frames, the first.

    Args:
        source: A file's path, a file's bytes, a Pillow picture, or an array that is RGB already.

    Shapes:
        uint8[H, W, 3], C-contiguous

    Raises:
        ImageError: If the file is missing, damaged or of another format, if the picture is empty
            or too large, or if an array is not uint8[H, W, 3].
    """
    if isinstance(source, np.ndarray):
        check_pixels(source)
        return np.ascontiguousarray(source, dtype=np.uint8)
    if isinstance(source, Image.Image):
        check_size(source.height, source.width)
        return _decode(source, None, upright=False)
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), len(source), "the bytes given")
    if isinstance(source, str | Path):
        return _read_file(Path(source))
    raise ImageError(
        "not a picture",
        got=type(source).__name__,
        wanted="a path, the bytes of a file, a Pillow picture or uint8[H, W, 3]",
    )


def _read_file(path: Path) -> Pixels:
    try:
        if not path.is_file():
            got = "a directory" if path.is_dir() else "no such file"
            wanted = "the path of a picture's file"
            raise ImageError("cannot read the picture", where=path, got=got, wanted=wanted)
        with path.open("rb") as file:
            return _read(file, path.stat().st_size, str(path))
    except OSError as error:
        reason = error.strerror or error
        raise ImageError("cannot read the picture", where=path, got=reason) from error


def _read(file: BinaryIO, size: int, where: str) -> Pixels:
    """Checks size and header, then decodes."""
    if size == 0:
        raise ImageError("empty file", where=where, got="0 bytes", wanted=_formats())
    if size > MAX_FILE_BYTES:
        raise ImageError(
            "file too large", where=where, got=f"{size} bytes", wanted=f"at most {MAX_FILE_BYTES}"
        )
    with warnings.catch_warnings():
        # Pillow's own size limit is higher than ours, and its other warnings tell of metadata
        # that is damaged but not needed.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(file, formats=FORMATS)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ImageError("picture too large", where=where, got=error) from error
        except UnidentifiedImageError as error:
            raise ImageError("not a picture", where=where, wanted=_formats()) from error
        except Exception as error:
            raise _damaged(where, error) from error
        with image:
            check_size(image.height, image.width, where)
            return _decode(image, where, upright=True)


def _decode(image: Image.Image, where: str | None, *, upright: bool) -> Pixels:
    """Decodes and converts to RGB.

    Pillow's decoders meet damaged data with whatever exception it happens to cause (OSError,
    SyntaxError, struct.error, IndexError, ...), so here, around Pillow alone, all of them count.
    """
    try:
        if upright:
            image = ImageOps.exif_transpose(image)
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            background = Image.new("RGBA", image.size, _WHITE)
            image = Image.alpha_composite(background, image)
        return np.array(image.convert("RGB"))
    except Exception as error:
        raise _damaged(where, error) from error


def _damaged(where: str | None, error: Exception) -> ImageError:
    reason = str(error) or type(error).__name__
    return ImageError("cannot decode the picture", where=where, got=reason)


def _formats() -> str:
    return f"one of {', '.join(FORMATS)}"
