"""How a weight is stored: the numbers of a scheme, and the codes a method computes for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lorgnette.spec import Frozen

Activations = Literal["float", "int8_group", "int8_token", "int8_static"]
"""How the inputs of a multiplication are rounded as they come: not at all; to 8 bits with a scale
for each position and each group of the weight's columns; for each position; or with one scale and
zero point that calibration found, for all positions of all pictures."""


ScaleBits = Literal[8, 16, 32]

INTEGER_BITS = (2, 3, 4, 8)
PALETTE_BITS = (4, 6, 8)
FLOAT_BITS = (16, 32)
NARROW = 64
"""How far narrow codes lie around the one that means zero."""
GROUP_SIZES = (16, 32, 64, 128)
"""Columns of a group; a `group_size` of 0 besides, for a whole row."""


class QuantScheme(Frozen, frozen=True):
    """How one weight is stored and multiplied.

    `bits` 32 and 16 are floats; less are integers in groups of `group_size` along the input axis,
    one scale a group, of `scale_bits`: a float, or, of 8 bits, a whole multiple of one float for
    the row (see `scales.py`). A `group_size` of 0 is a whole row: one scale an output channel, or,
    `per_tensor`, one for the whole matrix. Symmetric schemes have zero in the middle of their
    codes, others a zero point a group. Codes of a `palette` index a table of 2 ** bits float32
    values, one for `table_rows` rows together, 0 for the whole matrix. Codes of 8 bits that are
    `narrow` stay within 64 around the one that means zero: two products with bytes then fit 16
    bits, which lets processors without dot-product instructions add them in pairs.
    """

    bits: int
    group_size: int = 0
    symmetric: bool = True
    activations: Activations = "float"
    per_tensor: bool = False
    palette: bool = False
    table_rows: int = 0
    scale_bits: ScaleBits = 32
    narrow: bool = False

    @property
    def first(self) -> int:
        """The least code."""
        return NARROW if self.narrow else 0

    @property
    def last(self) -> int:
        """The largest code."""
        return 3 * NARROW if self.narrow else (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The code that means zero, of symmetric schemes."""
        return 1 << (self.bits - 1)

    @property
    def is_integer(self) -> bool:
        """Whether the weight is stored as integer codes."""
        return self.bits < 16

    @property
    def form(self) -> str:
        """How the weight is stored, in short.

        `int4g32` in groups, `int8c` by channel, `int8cn` of narrow codes, `int8t` for the whole
        matrix, `int4g32z` with zero points, `int4g32h` and `int4g32b` with scales of 16 and 8 bits,
        `int4g32b15` with those of 8 bits that integer kernels know, `palette4` and `palette4r16`
        with a table for all or for 16 rows, `float16`.
        """
        if not self.is_integer:
            return f"float{self.bits}"
        if self.palette:
            return f"palette{self.bits}" + (f"r{self.table_rows}" if self.table_rows else "")
        groups = f"g{self.group_size}" if self.group_size else "t" if self.per_tensor else "c"
        scales = {32: "", 16: "h", 8: "b"}[self.scale_bits]
        if self.scale_bits == 8 and self.most_steps < 127:
            scales += str(self.most_steps)
        kind = "n" if self.narrow else "" if self.symmetric else "z"
        return f"int{self.bits}{groups}{kind}{scales}"

    @property
    def full_name(self) -> str:
        """The form, and how activations are rounded where they are: `int4g32/int8_group`."""
        return self.form if self.activations == "float" else f"{self.form}/{self.activations}"

    def groups(self, columns: int) -> int:
        """Groups of a row of so many columns, the last one perhaps not full."""
        return -(-columns // self.group_size) if self.group_size else 1

    def padded(self, columns: int) -> int:
        """Columns that are stored for a row: its groups filled up."""
        return self.groups(columns) * self.group_size if self.group_size else columns

    def code_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix's packed codes, each row whole bytes."""
        return rows * -(-self.padded(columns) * self.bits // 8)

    def zero_point_bytes(self, rows: int, columns: int) -> int:
        """Bytes of its packed zero points, each row whole bytes; none of a symmetric scheme."""
        return (
            0
            if self.symmetric or self.palette
            else rows * -(-self.groups(columns) * self.bits // 8)
        )

    def scale_bytes(self, rows: int, columns: int) -> int:
        """Bytes of its scales, or of the float32 tables of a palette."""
        if self.palette:
            return 4 * self.tables(rows) << self.bits
        return self.scale_bits // 8 * rows * self.groups(columns)

    def row_scale_bytes(self, rows: int) -> int:
        """Bytes of the float32 numbers, one a row, that scales of 8 bits are multiples of."""
        return 4 * rows if self.is_integer and self.scale_bits == 8 else 0

    @property
    def most_steps(self) -> int:
        """How many times its row's number a scale of 8 bits is at most, either way.

        Integer kernels, which round activations by position or for all, know one scale a row:
        there code times multiple must still be a byte.
        """
        return (
            127 if self.activations in ("float", "int8_group") else max(127 >> (self.bits - 1), 1)
        )

    def tables(self, rows: int) -> int:
        """Tables of a palette of so many rows."""
        return -(-rows // self.table_rows) if self.table_rows else 1

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix with its scales and zero points, unpadded but for whole groups."""
        if not self.is_integer:
            return rows * columns * self.bits // 8
        codes, zeros = self.code_bytes(rows, columns), self.zero_point_bytes(rows, columns)
        return codes + self.scale_bytes(rows, columns) + self.row_scale_bytes(rows) + zeros


FLOAT32 = QuantScheme(bits=32)
FLOAT16 = QuantScheme(bits=16)


class InputRange(Frozen, frozen=True):
    """How static 8-bit activations are rounded: x is about `(code - zero_point) * scale`."""

    scale: float
    zero_point: int
    """The code that means 0, 0 to 255."""


@dataclass(frozen=True)
class QuantTensor:
    """A quantised matrix: weight = (code - zero point) * scale, or the palette's value of a code.

    Attributes:
        codes: uint8 `[rows, groups * group_size]`, values 0 .. 2**bits - 1, not packed; where
            the columns do not fill the last group it ends in codes that mean zero.
        scales: float32 `[rows, groups]`, all the same of schemes for the whole matrix; ones of a
            palette. What `scales.stored_scales` makes of them where they are of less
            than 32 bits.
        zero_points: uint8 `[rows, groups]`, the codes that mean 0; of symmetric schemes all
            2 ** (bits - 1), zeros of a palette.
        columns: Columns of the weight.
        scheme: What it was made for.
        tables: float32 `[tables, 2 ** bits]` of a palette.
        input_range: How its inputs are rounded, of a scheme with static activations.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8]
    columns: int
    scheme: QuantScheme
    tables: NDArray[np.float32] | None = None
    input_range: InputRange | None = None

    def dequantize(self) -> NDArray[np.float32]:
        """The weights that the codes stand for, float32 `[rows, columns]`."""
        rows, groups = self.scales.shape
        if self.tables is not None:
            together = self.scheme.table_rows or rows
            return self.tables[(np.arange(rows) // together)[:, None], self.codes]
        codes = self.codes.reshape(rows, groups, -1).astype(np.float32)
        codes -= self.zero_points[:, :, None]
        codes *= self.scales[:, :, None]
        return codes.reshape(rows, -1)[:, : self.columns]


def grouped(weight: NDArray[np.float32], group_size: int) -> NDArray[np.float32]:
    """`[rows, columns]` as `[rows, groups, group_size]`, the last group filled up with zeros.

    A `group_size` of 0 is a whole row.
    """
    rows, columns = weight.shape
    if not group_size:
        return weight.reshape(rows, 1, columns)
    missing = -columns % group_size
    padded = np.pad(weight, ((0, 0), (0, missing))) if missing else weight
    return padded.reshape(rows, -1, group_size)
