"""How a weight is stored: the numbers of a scheme, and the codes a method computes for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lorgnette.errors import ConfigError
from lorgnette.spec import Frozen

Activations = Literal["float", "int8_group", "int8_token", "int8_static"]
"""How the inputs of a multiplication are rounded as they come: not at all; to 8 bits with a scale
for each position and each group of the weight's columns; for each position; or with one scale and
zero point that calibration found, for all positions of all pictures."""


INTEGER_BITS = (2, 3, 4, 8)
PALETTE_BITS = (4, 6, 8)
FLOAT_BITS = (16, 32)
GROUP_SIZES = (16, 32, 64, 128)
"""Columns of a group; a `group_size` of 0 besides, for a whole row."""


class QuantScheme(Frozen, frozen=True):
    """How one weight is stored and multiplied.

    `bits` 32 and 16 are floats; less are integers in groups of `group_size` along the input axis,
    one scale a group, a float of `scale_bits`. A `group_size` of 0 is a whole row: one scale an
    output channel, or, `per_tensor`, one for the whole matrix. Symmetric schemes have zero in the
    middle of their codes, others a zero point a group. Codes of a `palette` index a table of
    2 ** bits float32 values, one for `table_rows` rows together, 0 for the whole matrix.
    """

    bits: int
    group_size: int = 0
    symmetric: bool = True
    activations: Activations = "float"
    per_tensor: bool = False
    palette: bool = False
    table_rows: int = 0
    scale_bits: Literal[16, 32] = 32

    @property
    def is_integer(self) -> bool:
        """Whether the weight is stored as integer codes."""
        return self.bits < 16

    @property
    def form(self) -> str:
        """How the weight is stored, in short.

        `int4g32` in groups, `int8c` by channel, `int8t` for the whole matrix, `int4g32z` with zero
        points, `int4g32h` with scales of 16 bits, `palette4` and `palette4r16` with a table for
        all or for 16 rows, `float16`.
        """
        if not self.is_integer:
            return f"float{self.bits}"
        if self.palette:
            return f"palette{self.bits}" + (f"r{self.table_rows}" if self.table_rows else "")
        groups = f"g{self.group_size}" if self.group_size else "t" if self.per_tensor else "c"
        zeros, half = "" if self.symmetric else "z", "h" if self.scale_bits == 16 else ""
        return f"int{self.bits}{groups}{zeros}{half}"

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

    def tables(self, rows: int) -> int:
        """Tables of a palette of so many rows."""
        return -(-rows // self.table_rows) if self.table_rows else 1

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix with its scales and zero points, unpadded but for whole groups."""
        if not self.is_integer:
            return rows * columns * self.bits // 8
        codes, zeros = self.code_bytes(rows, columns), self.zero_point_bytes(rows, columns)
        return codes + self.scale_bytes(rows, columns) + zeros


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
            palette. Each is a float16 too where the scheme's are of 16 bits.
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


def half_scales(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scales rounded to float16, as float32, for codes that are chosen after.

    A scale too small for float16 becomes its least number, with its sign, so that a group of tiny
    weights keeps what codes it can; 0 stays 0.

    Raises:
        ConfigError: One is too large.
    """
    with np.errstate(over="ignore"):  # told below
        half = scales.astype(np.float16)
    if not np.isfinite(half).all():
        raise ConfigError(
            "a scale is too large for 16 bits",
            got=float(np.abs(scales).max()),
            wanted=f"<= {float(np.finfo(np.float16).max):g}",
            hint="keep scales of 32 bits",
        )
    lost = (half == 0) & (scales != 0)
    half[lost] = np.copysign(np.finfo(np.float16).smallest_subnormal, scales[lost])
    return half.astype(np.float32)
