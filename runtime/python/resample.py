"""Picture resampling in fixed point, bit for bit as Pillow 12.2 and 12.3 do it.

Older Pillow differs only for pictures over a hundred times taller than wide (see `TALL`); Pillow
13 orders the passes in another way again.

Why it is exact here: a weight is an integer of at most 23 bits over 2**22 and a pixel has 8 bits,
so every product and every sum of them is a whole multiple of 2**-22 far below 2**31. float64
holds such numbers without rounding, whatever the order of the additions; a matrix product from
any BLAS therefore gives the same sums as Pillow's integer loop.

Why it is fast: 16 or 32 neighbouring outputs read almost the same inputs. Each such block is a
small dense matrix product; the half that rounding needs is one more column of it. The products
go to the BLAS in parts too small for it to start threads: those wait for each other after every
product, which takes ages where other programs hold the cores.

Source: Pillow, src/libImaging/Resample.c.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from lorgnette.errors import ImageError, RequestError

Filter = Literal["lanczos", "bicubic", "bilinear"]
Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

PRECISION_BITS = 22
STRIP_BYTES = 64 << 20
"""Most bytes kept between the horizontal and the vertical pass."""
TALL = 100
"""A picture this many times taller than wide is made lower before its width changes."""

# Measured on AVX2 (OpenBLAS): wider blocks waste products on zeros, narrower ones starve the BLAS.
_BLOCK = 16
_BLOCK_ENLARGING_ROWS = 32
_COLUMNS = 6144
_ROWS = 2048
_SCRATCH_ELEMENTS = 1 << 19
# OpenBLAS stays on one thread up to this many multiplications (interface/gemm.c).
_ONE_THREAD = 1 << 18

_ZERO = np.int16(0)
_WHITE = np.int16(255)


def resize(image: Pixels, height: int, width: int, filter: Filter) -> Pixels:
    """Resizes a picture as `PIL.Image.Image.resize` does.

    Args:
        image: The picture.
        height: Height wanted, in pixels.
        width: Width wanted, in pixels.
        filter: Name of the resampling filter.

    Shapes:
        image uint8[H, W, 3] -> uint8[height, width, 3]

    Raises:
        ImageError: If the picture is not uint8[H, W, 3] or has no pixels.
        RequestError: If the size wanted is not positive or the filter is unknown.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ImageError(
            "cannot resize this array",
            got=f"{image.dtype}{list(image.shape)}",
            wanted="uint8[H, W, 3] with H and W of at least 1",
        )
    planes = resize_planes(image.transpose(0, 2, 1), height, width, filter)
    return np.ascontiguousarray(planes.transpose(0, 2, 1))


def resize_planes(planes: Pixels, height: int, width: int, filter: Filter) -> Pixels:
    """Resizes a picture whose rows hold one channel after the other.

    Both passes then run over contiguous rows: `[H * 3, W]` for the horizontal one and
    `[H, 3 * W]` for the vertical one. `planes` may have any strides; the result is a new array.
    The other arguments are those of `resize`.

    Shapes:
        planes uint8[H, 3, W] -> uint8[height, 3, width]

    Raises:
        RequestError: If the size wanted is not positive or the filter is unknown.

    Source: ImagingResample in Pillow's Resample.c: horizontal pass first, each pass rounds to
        uint8, a pass that keeps its size is left out. Image.resize in Image.py: the tall ones.
    """
    if height < 1 or width < 1:
        raise RequestError("cannot resize", got=f"{height} x {width}", wanted="at least 1 x 1")
    if filter not in _FILTERS:
        raise RequestError("unknown filter", got=repr(filter), wanted=" or ".join(_FILTERS))
    source_height, channels, source_width = planes.shape
    if height == source_height:
        if width == source_width:
            return np.array(planes, order="C")
        return _horizontal(planes, width, filter)
    if source_height > TALL * source_width and height < source_height and width != source_width:
        planes = resize_planes(planes, height, source_width, filter)
        return _horizontal(planes, width, filter)
    out = np.empty((height, channels, width), np.uint8)
    blocks = _blocks(source_height, height, filter, _BLOCK)
    # Strips of output rows bound the memory; neighbours repeat a few rows of the first pass.
    strips = math.ceil(source_height * channels * width / STRIP_BYTES)
    per_strip = math.ceil(len(blocks) / strips)
    for start in range(0, len(blocks), per_strip):
        inside = blocks[start : start + per_strip]
        rows = planes[inside[0].first_in : inside[-1].end_in]
        if width != source_width:
            rows = _horizontal(rows, width, filter)
        _vertical(rows, out[inside[0].first_out : inside[-1].end_out], inside)
    return out


class _Block(NamedTuple):
    """Some neighbouring outputs and the range of inputs that they read, equally long for all.

    `weights` is float64[outputs, inputs + 1]; the last column is 1 and meets an input of 0.5.
    """

    first_out: int
    end_out: int
    first_in: int
    end_in: int
    weights: Floats


def _horizontal(planes: Pixels, width: int, filter: Filter) -> Pixels:
    """uint8[H, C, W] -> uint8[H, C, width]: each row resampled on its own."""
    height, channels, source_width = planes.shape
    outputs = _BLOCK_ENLARGING_ROWS if width > source_width else _BLOCK
    blocks = _blocks(source_width, width, filter, outputs)
    support = blocks[0].weights.shape[1]
    most = max(1, min(_ROWS, _SCRATCH_ELEMENTS // (support + outputs)) // channels)
    step = _even(height, most)
    size = _even(step * channels, _ONE_THREAD // (outputs * support))
    parts = math.ceil(step * channels / size)
    values = np.zeros((parts, size, support))
    values[:, :, -1] = 0.5
    sums = np.empty((parts, size, outputs))
    whole = np.empty((step * channels, outputs), np.int16)
    out = np.empty((height, channels, width), np.uint8)
    for top in range(0, height, step):
        # Costs nothing where the rows are contiguous already.
        rows = np.ascontiguousarray(planes[top : top + step]).reshape(-1, source_width)
        target = out[top : top + step].reshape(-1, width)
        count = len(rows)
        for first_out, end_out, first_in, end_in, weights in blocks:
            used = end_out - first_out
            values.reshape(-1, support)[:count, :-1] = rows[:, first_in:end_in]
            np.matmul(values, weights.T, out=sums[:, :, :used])
            result = sums.reshape(-1, outputs)[:count, :used]
            _store(result, whole[:count, :used], target[:, first_out:end_out])
    return out


def _vertical(planes: Pixels, out: Pixels, blocks: tuple[_Block, ...]) -> None:
    """Fills `out` from the rows of `planes`, each column resampled on its own.

    Both may be strips of a picture: they begin where the first of `blocks` does.
    """
    matrix = np.ascontiguousarray(planes).reshape(len(planes), -1)
    target = out.reshape(len(out), -1)
    top_in, top_out = blocks[0].first_in, blocks[0].first_out
    columns = matrix.shape[1]
    support = blocks[0].weights.shape[1]
    step = _even(columns, min(_COLUMNS, _SCRATCH_ELEMENTS // (support + _BLOCK)))
    size = _even(step, _ONE_THREAD // (_BLOCK * support))
    parts = math.ceil(step / size)
    values = np.zeros((support, parts * size))
    values[-1] = 0.5
    sums = np.empty((_BLOCK, parts * size))
    whole = np.empty((_BLOCK, step), np.int16)
    for left in range(0, columns, step):
        width = min(step, columns - left)
        inside = slice(left, left + width)
        for first_out, end_out, first_in, end_in, weights in blocks:
            used = end_out - first_out
            values[:-1, :width] = matrix[first_in - top_in : end_in - top_in, inside]
            np.matmul(
                weights,
                values.reshape(support, parts, size).transpose(1, 0, 2),
                out=sums[:used].reshape(used, parts, size).transpose(1, 0, 2),
            )
            lines = target[first_out - top_out : end_out - top_out, inside]
            _store(sums[:used, :width], whole[:used, :width], lines)


def _even(length: int, most: int) -> int:
    """Size of the fewest parts of equal size, at most `most` (but 16 at least), of a length."""
    return math.ceil(length / math.ceil(length / max(16, most)))


def _store(sums: Floats, whole: npt.NDArray[np.int16], out: Pixels) -> None:
    """Cuts sums that hold the half of rounding already to 0..255 bytes.

    Truncation equals Pillow's arithmetic shift for all sums from 0 on, and both make 0 of the
    others. int16 holds them all, and clips three times faster than float64.

    Source: clip8 in Pillow's Resample.c.
    """
    np.copyto(whole, sums, casting="unsafe")
    whole.clip(_ZERO, _WHITE, out=whole)
    np.copyto(out, whole, casting="unsafe")


@lru_cache(maxsize=32)
def _blocks(source: int, target: int, filter: Filter, outputs: int) -> tuple[_Block, ...]:
    """The resampling of `source` pixels to `target` as blocks of `outputs` outputs each."""
    first, weights = coefficients(source, target, filter)
    inputs = first[:, None] + np.arange(weights.shape[1])
    starts = np.arange(0, target, outputs)
    stops = np.minimum(starts + outputs, target)
    low = first[starts]
    width = int((np.minimum(inputs[stops - 1, -1] + 1, source) - low).max())
    # Blocks at the end read further back than they need to, so that all are of one width.
    low = np.minimum(low, source - width)
    places = inputs - np.repeat(low, outputs)[:target, None]
    dense = np.zeros((target, width + 1))
    # Inputs past the end weigh nothing; they fall on the last column, which is set after.
    dense[np.arange(target)[:, None], np.minimum(places, width)] = weights / (1 << PRECISION_BITS)
    dense[:, -1] = 1.0
    dense.setflags(write=False)
    return tuple(
        _Block(start, stop, first_in, first_in + width, dense[start:stop])
        for start, stop, first_in in zip(starts.tolist(), stops.tolist(), low.tolist(), strict=True)
    )


def coefficients(
    source: int, target: int, filter: Filter
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The fixed-point weights that make `target` pixels of `source` pixels.

    Args:
        source: Length of the input, in pixels.
        target: Length of the output, in pixels.
        filter: Name of the resampling filter.

    Shapes:
        first int64[target]: the first input of each output.
        weights int64[target, taps]: of the inputs from there on, in units of 2**-22.

    Source: precompute_coeffs and normalize_coeffs_8bpc in Pillow's Resample.c, in the same order
        of float64 operations.
    """
    shape, radius = _FILTERS[filter]
    scale = source / target
    stretch = max(scale, 1.0)
    support = radius * stretch
    center = (np.arange(target) + 0.5) * scale
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    end = np.minimum((center + support + 0.5).astype(np.int64), source)
    taps = np.arange(int((end - first).max()))
    values = shape((taps + first[:, None] - center[:, None] + 0.5) * (1.0 / stretch))
    values[taps >= (end - first)[:, None]] = 0.0
    # accumulate adds one tap after the other, as the C loop does; sum() would add in pairs.
    total = np.add.accumulate(values, axis=1)[:, -1:]
    np.divide(values, total, out=values, where=total != 0.0)
    scaled = values * (1 << PRECISION_BITS)
    return first, np.where(values < 0, scaled - 0.5, scaled + 0.5).astype(np.int64)


def _bilinear(x: Floats) -> Floats:
    distance = np.abs(x)
    return np.where(distance < 1.0, 1.0 - distance, 0.0)


def _bicubic(x: Floats) -> Floats:
    a = -0.5
    d = np.abs(x)
    near = ((a + 2.0) * d - (a + 3.0)) * d * d + 1
    far = (((d - 5) * d + 8) * d - 4) * a
    return np.where(d < 1.0, near, np.where(d < 2.0, far, 0.0))


def _lanczos(x: Floats) -> Floats:
    return np.where((x >= -3.0) & (x < 3.0), _sinc(x) * _sinc(x / 3), 0.0)


def _sinc(x: Floats) -> Floats:
    angle = x * math.pi
    return np.divide(np.sin(angle), angle, out=np.ones_like(x), where=x != 0.0)


_FILTERS: dict[str, tuple[Callable[[Floats], Floats], float]] = {
    "lanczos": (_lanczos, 3.0),
    "bicubic": (_bicubic, 2.0),
    "bilinear": (_bilinear, 1.0),
}
