"""llama.cpp's 4-bit formats for a float32 matrix, as rivals to compare with.

Q4_0 is the `gguf` package's own. That package reads Q4_K and cannot write it, so its blocks are
made here, after the published format and search, and read back by the package.
"""

from __future__ import annotations

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

Array = NDArray[np.float32]

SUPER, BLOCK = 256, 32
TRIES = 21
"""Steps that ggml's search tries for each block of Q4_K."""


def q4_0(weight: Array) -> Array:
    """A matrix after Q4_0: blocks of 32, a float16 scale each, 4.5 bits a weight."""
    packed = gguf.quants.quantize(weight, GGMLQuantizationType.Q4_0)
    made: Array = gguf.quants.dequantize(packed, GGMLQuantizationType.Q4_0)
    return made


def q4_k(weight: Array) -> Array:
    """A matrix after Q4_K: 8 blocks of 32 with 6-bit scales and minima, 4.5 bits a weight.

    Rows that are no multiple of 256 are filled up with zeros, where llama.cpp would take another
    format of more bits.

    Source: ggml, the format of block_q4_K and the search of make_qkx2_quants.
    """
    rows, columns = weight.shape
    padded = np.pad(weight, ((0, 0), (0, -columns % SUPER)))
    blocks = padded.reshape(-1, SUPER // BLOCK, BLOCK)
    packed = _pack(blocks, *_search(blocks))
    made = gguf.quants.dequantize(packed, GGMLQuantizationType.Q4_K).reshape(rows, -1)
    return np.ascontiguousarray(made[:, :columns], np.float32)


def _search(blocks: Array) -> tuple[Array, Array]:
    """Scale and minimum (0 or more, subtracted) of each block by weighted least squares.

    Shapes: `[S, 8, 32]` to twice `[S, 8]`.
    """
    weights = np.sqrt((blocks**2).mean(-1, keepdims=True)) + np.abs(blocks)
    low = np.minimum(blocks.min(-1), 0)
    spread = np.maximum(blocks.max(-1) - low, 1e-12)
    best_scale, best_min = spread / 15, -low
    least = np.full(low.shape, np.inf)
    for attempt in range(TRIES):
        inverse = (15 - 1 + 0.1 * attempt) / spread
        codes = np.clip(np.rint(inverse[..., None] * (blocks - low[..., None])), 0, 15)
        total = weights.sum(-1)
        sum_code, sum_square = (weights * codes).sum(-1), (weights * codes**2).sum(-1)
        sum_x, sum_both = (weights * blocks).sum(-1), (weights * codes * blocks).sum(-1)
        determinant = total * sum_square - sum_code**2
        safe = np.where(determinant > 0, determinant, 1)
        scale = (total * sum_both - sum_x * sum_code) / safe
        minimum = (sum_square * sum_x - sum_code * sum_both) / safe
        above = minimum > 0
        scale = np.where(above, sum_both / np.maximum(sum_square, 1e-30), scale)
        minimum = np.where(above, 0, minimum)
        off = scale[..., None] * codes + minimum[..., None] - blocks
        error = np.where(determinant > 0, (weights * off**2).sum(-1), np.inf)
        better = error < least
        least = np.where(better, error, least)
        best_scale = np.where(better, scale, best_scale)
        best_min = np.where(better, -minimum, best_min)
    return best_scale.astype(np.float32), best_min.astype(np.float32)


def _pack(blocks: Array, scales: Array, minima: Array) -> NDArray[np.uint8]:
    """Bytes of block_q4_K: d, dmin, twelve bytes of 6-bit numbers, 128 bytes of codes."""
    d, d_min = ((np.maximum(v.max(-1), 0) / 63).astype(np.float16) for v in (scales, minima))
    steps, lows = (
        np.clip(np.rint(v / np.maximum(unit.astype(np.float32), 1e-30)[:, None]), 0, 63).astype(
            np.uint8
        )
        for v, unit in ((scales, d), (minima, d_min))
    )
    scale = d.astype(np.float32)[:, None] * steps
    minimum = d_min.astype(np.float32)[:, None] * lows
    safe = np.where(scale > 0, scale, 1)[..., None]
    codes = np.clip(np.rint((blocks + minimum[..., None]) / safe), 0, 15).astype(np.uint8)
    six = np.zeros((len(blocks), 12), np.uint8)
    six[:, 0:4] = steps[:, :4] | ((steps[:, 4:] >> 4) << 6)
    six[:, 4:8] = lows[:, :4] | ((lows[:, 4:] >> 4) << 6)
    six[:, 8:12] = (steps[:, 4:] & 15) | ((lows[:, 4:] & 15) << 4)
    nibbles = (codes[:, 0::2] | (codes[:, 1::2] << 4)).reshape(len(blocks), -1)
    heads = np.stack([d, d_min], axis=1).view(np.uint8)
    return np.concatenate([heads, six, nibbles], axis=1)


def q4_k_m(name: str, layer: int, layers: int, weight: Array, value_rows: int) -> Array:
    """A matrix of a decoder layer in the mixture that llama.cpp calls Q4_K_M.

    Values and down projections of some layers get Q6_K there. Here they are left as they are,
    which is better than that: the rival is not made worse than it is.

    Args:
        name: The matrix.
        layer: Number of its layer.
        layers: How many there are.
        weight: Its numbers.
        value_rows: How many rows at the end of `qkv_proj` are values.

    Source: llama.cpp, llama_tensor_get_type and use_more_bits.
    """
    eighth = layers // 8
    more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    made = q4_k(weight)
    if more and "down_proj" in name:
        return weight
    if more and "qkv_proj" in name:
        made[-value_rows:] = weight[-value_rows:]
    return made
