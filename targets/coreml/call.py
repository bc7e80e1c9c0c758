"""One operator as the evaluator calls it: its operands as torch tensors and numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorgnette.errors import BundleError
from lorgnette.targets.coreml.package import Constant, Operation, ValueType

Operand = Tensor | str
Result = Tensor | Sequence[Tensor]


@dataclass
class Call:
    """An operator with its operands.

    Attributes:
        operation: What the program says.
        operands: By parameter; several where the operator takes a list.
        states: The states of the run, for the operators that read and write them.
        in_place: Whether an update may write into its operand, which nothing else reads.
    """

    operation: Operation
    operands: Mapping[str, Sequence[Operand]]
    states: dict[str, Tensor]
    in_place: bool = False

    def tensors(self, name: str) -> list[Tensor]:
        """The tensors of a parameter."""
        return [each for each in self.operands[name] if isinstance(each, Tensor)]

    def tensor(self, name: str) -> Tensor:
        """The one tensor of a parameter."""
        (found,) = self.tensors(name)
        return found

    def has(self, name: str) -> bool:
        """Whether a parameter is given."""
        return name in self.operands

    def ints(self, name: str) -> list[int]:
        """A vector of whole numbers."""
        return [int(value) for value in self.tensor(name).reshape(-1).tolist()]

    def integer(self, name: str, default: int = 0) -> int:
        """A whole number."""
        return int(self.tensor(name).item()) if self.has(name) else default

    def number(self, name: str) -> float:
        """A number."""
        return float(self.tensor(name).item())

    def flag(self, name: str) -> bool:
        """True or false; false where it is not given."""
        return bool(self.tensor(name).item()) if self.has(name) else False

    def flags(self, name: str, count: int) -> list[bool]:
        """A vector of true and false; all false where it is not given."""
        return self.tensor(name).tolist() if self.has(name) else [False] * count

    def text(self, name: str, default: str = "") -> str:
        """A word."""
        if not self.has(name):
            return default
        (found,) = self.operands[name]
        if not isinstance(found, str):
            raise self.error("number in the place of a word", got=name)
        return found

    @property
    def out(self) -> ValueType:
        """What the program says of the one result."""
        ((_, type_),) = self.operation.outputs
        return type_

    def expect(self, shape: Sequence[int]) -> None:
        """Refuses, before anything of that size is made, a result of another shape.

        Raises:
            BundleError: The program promises another.
        """
        if tuple(shape) != self.out.shape:
            raise self.error("result is of another shape", got=tuple(shape), wanted=self.out.shape)

    def only(self, name: str, wanted: object, got: object) -> None:
        """Refuses a variant of an operator that no package of ours has.

        Raises:
            BundleError: It is one.
        """
        if got != wanted:
            raise self.error(f"'{name}' is not supported", got=got, wanted=wanted)

    def error(self, what: str, *, got: object = None, wanted: object = None) -> BundleError:
        """A refusal, told where."""
        names = ", ".join(name for name, _ in self.operation.outputs)
        where = f"operator {self.operation.type} '{names}'"
        return BundleError(what, where=where, got=got, wanted=wanted)


Kernel = Callable[[Call], Result]

TORCH_DTYPES = {
    "bool": torch.bool,
    "float16": torch.float32,
    "float32": torch.float32,
    "int8": torch.int8,
    "int32": torch.int32,
    "int4": torch.int8,
    "uint8": torch.uint8,
    "uint4": torch.uint8,
    "uint6": torch.uint8,
}
"""What values are held as: float16 as float32 with numbers that float16 has."""


def to_tensor(constant: Constant, array: object) -> Operand:
    """A constant as an operand."""
    if isinstance(array, str):
        return array
    return torch.as_tensor(array).to(TORCH_DTYPES[constant.type.dtype])
