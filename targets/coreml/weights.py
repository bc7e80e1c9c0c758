"""The weights of one package: placeholders in its functions, numbers written when it is saved.

A constant of a function is a zero repeated without memory, under a key. Equal keys mean equal
numbers, so that functions share what they have in common; what a key stands for is made only while
the file of weights is written, one array at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lorgnette.targets.coreml.mil import Builder, Var, types

Make = Callable[[], NDArray[np.generic]]

INLINE = 10
"""Elements below which coremltools keeps an array of whole bytes inside the program."""

DTYPES: dict[str, np.dtype[np.generic]] = {
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "int32": np.dtype(np.int32),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "int4": types.np_int4_dtype,
    "uint4": types.np_uint4_dtype,
    "uint6": types.np_uint6_dtype,
}
"""How arrays of each storage type are held by coremltools: less than a byte in a byte, marked."""
BITS = {name: int(name.lstrip("uintfloa")) for name in DTYPES}


class WeightStore:
    """Constants by key, and what makes their numbers.

    Attributes:
        weight_bytes: Bytes by form, each key counted once.
        exceptions: What is carried otherwise than the plan says, with the matrices of each kind;
            known in full once the package is written.
    """

    def __init__(self) -> None:
        """Starts without any."""
        self.weight_bytes: Counter[str] = Counter()
        self.exceptions: dict[str, set[str]] = {}
        self._made: dict[str, Make] = {}

    def constant(
        self, name: str, key: str, dtype: str, shape: tuple[int, ...], make: Make, *, form: str
    ) -> Var:
        """A constant of the function under construction.

        Args:
            name: Its name there.
            key: What the numbers are; equal keys mean equal numbers.
            dtype: A name of `DTYPES`.
            shape: Its shape.
            make: Gives the array, of any dtype that holds the numbers.
            form: What it is counted as.
        """
        if key not in self._made:
            self._made[key] = make
            self.weight_bytes[form] += -(-math.prod(shape) * BITS[dtype] // 8)
        if math.prod(shape) < INLINE and BITS[dtype] >= 8:
            value = make().astype(DTYPES[dtype]).reshape(shape)
        else:
            value = np.broadcast_to(np.zeros((), DTYPES[dtype]), shape)
        made = Builder.const(val=value, name=name)
        made.op.weight_id = key
        return made

    def numbers(self, key: str) -> NDArray[np.generic] | None:
        """The array of a key, made anew; None of a key that is no weight's."""
        return self._made[key]() if key in self._made else None
