"""KV caches of 8 bits: one step for each channel of each head, found by calibration."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorgnette.quantize.store import QuantizedSource

MOST = 127
"""Codes lie that far around 0."""
LOWEST = -128
MARGIN = 1.1
"""Calibration sees little of what will be: a tenth more than it saw fits."""


class CacheRanges:
    """The largest keys, rotated as they are cached, and values of one layer, channel by channel."""

    def __init__(self) -> None:
        """Has seen nothing."""
        self._largest: dict[str, Tensor] = {}

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Looks at some positions. Shapes: `[B, Hkv, T, Dh]`."""
        for name, cached in (("key", keys), ("value", values)):
            largest = cached.abs().amax((0, 2))
            seen = self._largest.get(name)
            self._largest[name] = largest if seen is None else torch.maximum(seen, largest)

    def place(self, source: QuantizedSource, layer: int) -> None:
        """Keeps the steps that fit a layer."""
        for name, largest in self._largest.items():
            source.place_cache_scale(f"{name}_{layer}", cache_scale(largest.numpy()))

    def clear(self) -> None:
        """Forgets all of it."""
        self._largest.clear()


def cache_scale(largest: NDArray[np.float32]) -> NDArray[np.float32]:
    """The steps of channels whose largest elements were these, never 0."""
    scale = largest * np.float32(MARGIN / MOST)
    fitting: NDArray[np.float32] = np.maximum(scale, np.float32(1e-30))
    return fitting


def round_cached(cached: Tensor, scale: Tensor) -> Tensor:
    """Keys or values as a cache of 8 bits holds them.

    Shapes: `[B, Hkv, T, Dh]` and `[Hkv, Dh]`.
    Source: onnxruntime's notes on GroupQueryAttention, PER_CHANNEL, and its MLAS, qkv_quant.
    """
    steps = scale[:, None]
    return (cached / steps).round().clamp(LOWEST, MOST) * steps
