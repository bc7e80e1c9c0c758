"""How a weight is stored: the numbers of a scheme, and the codes a method computes for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorgnette.spec import Frozen


class QuantScheme(Frozen, frozen=True):
    """How one weight is stored and multiplied.

    `bits` 32 and 16 are floats; 8 and 4 are integers in groups of `group_size` along the input
    axis, symmetric around zero, one float32 scale a group. `int8_activations` lets an engine
    round the activations of each multiplication to 8 bits, which is what makes decoding fast.
    """

    bits: int
    group_size: int = 0
    int8_activations: bool = False

    @property
    def is_integer(self) -> bool:
        """Whether the weight is stored as integer codes."""
        return self.bits < 16

    def stored_bytes(self, elements: int) -> int:
        """Bytes that `elements` weights take, scales included.

        Columns that do not fill a row's last group count as if they did: they are stored so.
        """
        scales = 4 * (elements // self.group_size) if self.is_integer else 0
        return elements * self.bits // 8 + scales


FLOAT32 = QuantScheme(bits=32)
FLOAT16 = QuantScheme(bits=16)


@dataclass(frozen=True)
class QuantTensor:
    """A quantised matrix: weight = (code - zero_point) * scale.

    Attributes:
        codes: uint8 `[rows, groups * group_size]`, values 0 .. 2**bits - 1, not packed; where
            the columns do not fill the last group it ends in codes that mean zero.
        scales: float32 `[rows, groups]`.
        columns: Columns of the weight.
        zero_point: The code that means 0, the same everywhere: 2 ** (bits - 1).
        scheme: What it was made for.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    columns: int
    zero_point: int
    scheme: QuantScheme

    def dequantize(self) -> NDArray[np.float32]:
        """The weights that the codes stand for, float32 `[rows, columns]`."""
        rows = self.codes.shape[0]
        grouped = self.codes.reshape(rows, -1, self.scheme.group_size).astype(np.float32)
        weights = (grouped - np.float32(self.zero_point)) * self.scales[:, :, None]
        return weights.reshape(rows, -1)[:, : self.columns]


def grouped(weight: NDArray[np.float32], group_size: int) -> NDArray[np.float32]:
    """`[rows, columns]` as `[rows, groups, group_size]`, the last group filled up with zeros."""
    rows, columns = weight.shape
    missing = -columns % group_size
    padded = np.pad(weight, ((0, 0), (0, missing))) if missing else weight
    return padded.reshape(rows, -1, group_size)
