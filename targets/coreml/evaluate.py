"""Runs the functions of a saved package with torch, so that what was written is checked off a Mac.

This emulates Core ML: its own kernels are not to be had on Linux. What is emulated is what the
program says, operator by operator: every result whose type is float16 is rounded to float16, sums
within an operator are taken in float32. An engine may sum in another order or keep more digits
between operators, and the Neural Engine may sum in float16; so results of a device differ from
these in the last digits of float16.

In `exact` mode nothing is rounded: floats are float32 throughout, weights as they are stored. What
rounding would hide, it shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorgnette.errors import BundleError
from lorgnette.targets.coreml.call import Call, Kernel, Operand, to_tensor
from lorgnette.targets.coreml.kernels import KERNELS
from lorgnette.targets.coreml.kernels_moves import MOVES
from lorgnette.targets.coreml.package import Constant, FunctionCode, Operation, Package

Array = NDArray[np.generic]
State = dict[str, Tensor]

KEPT_BYTES = 2 << 30
"""Weights that are kept as float32 once they were expanded; those beyond are expanded each time."""
MAX_STATE_ELEMENTS = 1 << 31
_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError)
"""What torch raises of operands that do not fit one another."""


@dataclass(frozen=True)
class Step:
    """An operator of a function, made ready to run."""

    operation: Operation
    kernel: Kernel
    moves: bool
    done_with: tuple[str, ...]
    """Values that nothing reads after it."""
    in_place: bool
    weights: object | None
    """What a constant or an expansion of constants is made of."""


class Evaluator:
    """A package and what is kept of it between runs."""

    def __init__(self, package: Package, *, exact: bool = False) -> None:
        """Prepares every function.

        Args:
            package: As read.
            exact: Whether nothing is rounded to float16.

        Raises:
            BundleError: An operator is not known here.
        """
        self.package = package
        self._exact = exact
        self._steps = {name: _prepare(code) for name, code in package.functions.items()}
        self._kept: dict[object, Operand] = {}
        self._kept_bytes = 0

    def new_state(self, function: str) -> State:
        """The states of a function, all zeros.

        Raises:
            BundleError: They are too large.
        """
        types = self.package.functions[function].states
        if sum(int(np.prod(t.shape)) for t in types.values()) > MAX_STATE_ELEMENTS:
            raise BundleError("states are too large", where=self.package.path)
        return {name: torch.zeros(type_.shape) for name, type_ in types.items()}

    @torch.inference_mode()
    def run(
        self, function: str, inputs: Mapping[str, Array], state: State | None = None
    ) -> dict[str, Array]:
        """Runs a function; float results come as float32.

        Args:
            function: Its name.
            inputs: What it takes.
            state: What it reads and writes, as `new_state` made it.

        Raises:
            BundleError: An input is not what the function takes, or the program contradicts itself.
        """
        code = self.package.functions[function]
        values: dict[str, Operand] = {}
        for name, type_ in code.inputs.items():
            array = np.ascontiguousarray(inputs[name])
            if array.shape != type_.shape:
                raise BundleError(f"input '{name}' does not fit", got=array.shape, wanted=type_)
            values[name] = self._rounded(to_tensor(Constant(type_, array), array), type_.dtype)
        states = {} if state is None else state
        values |= {name: name for name in code.states}
        for step in self._steps[function]:
            self._run_step(step, values, states)
        copied = bool(states)  # else a result could be a part of a state, and change with it
        return {name: _numpy(values[name], copied=copied) for name in code.outputs}

    def _run_step(self, step: Step, values: dict[str, Operand], states: State) -> None:
        operation = step.operation
        key = step.weights
        if key is not None and key in self._kept:
            results: Sequence[Operand] = (self._kept[key],)
        else:
            results = self._compute(step, values, states)
            if key is not None:
                self._keep(key, results[0])
        for (name, _), value in zip(operation.outputs, results, strict=True):
            values[name] = value
        for name in step.done_with:
            del values[name]

    def _compute(
        self, step: Step, values: Mapping[str, Operand], states: State
    ) -> Sequence[Operand]:
        operation = step.operation
        operands = {
            name: [self._operand(each, values) for each in given]
            for name, given in operation.inputs.items()
        }
        if operation.type == "const":
            return operands["val"]
        call = Call(operation, operands, states, step.in_place)
        try:
            made = step.kernel(call)
        except _FAILURES as error:
            raise call.error("operator cannot be run", got=_first_line(error)) from error
        results = (made,) if isinstance(made, Tensor) else tuple(made)
        if [tuple(r.shape) for r in results] != [t.shape for _, t in operation.outputs]:
            raise call.error(
                "result is of another shape",
                got=[tuple(r.shape) for r in results],
                wanted=[t.shape for _, t in operation.outputs],
            )
        if step.moves:
            return results
        types = (type_.dtype for _, type_ in operation.outputs)
        return [self._rounded(r, dtype) for r, dtype in zip(results, types, strict=True)]

    def _operand(self, given: str | Constant, values: Mapping[str, Operand]) -> Operand:
        if isinstance(given, str):
            return values[given]
        if isinstance(given.value, str):
            return given.value
        return to_tensor(given, np.array(self.package.array(given)))

    def _rounded(self, value: Operand, dtype: str) -> Operand:
        if self._exact or dtype != "float16" or isinstance(value, str):
            return value
        return value.half().float()

    def _keep(self, key: object, value: Operand) -> None:
        size = value.nbytes if isinstance(value, Tensor) else 0
        if self._kept_bytes + size <= KEPT_BYTES:
            self._kept[key] = value
            self._kept_bytes += size


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def unknown_operators(package: Package) -> list[str]:
    """Operators of a package that the evaluator lacks."""
    known = {"const", *KERNELS, *MOVES}
    used = {step.type for code in package.functions.values() for step in code.operations}
    return sorted(used - known)


def _prepare(code: FunctionCode) -> tuple[Step, ...]:
    uses: Counter[str] = Counter(list(code.outputs))
    last: dict[str, int] = {}
    for index, operation in enumerate(code.operations):
        for name in _names(operation):
            uses[name] += 1
            last[name] = index
        for name, _ in operation.outputs:
            last.setdefault(name, index)
    ends: dict[int, list[str]] = {}
    for name, index in last.items():
        if name not in code.outputs and name not in code.states:
            ends.setdefault(index, []).append(name)
    fresh = _fresh_states(code, uses)
    steps = []
    for index, operation in enumerate(code.operations):
        moves = operation.type in MOVES
        kernel = MOVES.get(operation.type) or KERNELS.get(operation.type)
        if kernel is None and operation.type != "const":
            raise BundleError(
                "operator is not known to the evaluator",
                where=f"function '{code.name}'",
                got=operation.type,
            )
        done = tuple(ends.get(index, ()))
        weights = _weights_of(operation)
        in_place = index in fresh
        steps.append(Step(operation, kernel or _no_kernel, moves, done, in_place, weights))
    return tuple(steps)


def _no_kernel(call: Call) -> Tensor:
    raise call.error("a constant is not computed")


def _fresh_states(code: FunctionCode, uses: Mapping[str, int]) -> set[int]:
    """Updates of a state that may write into it: what they read is read by nothing else.

    They are told by their place among the operations.

    The pattern is `x = read_state(s); y = slice_update(x, ...); write_state(s, y)`: x is the first
    that is read of s and used once, y is written before anything reads it, nothing else is written.
    """
    writes = Counter(_given(o, "input") for o in code.operations if o.type == "write_state")
    read: dict[str | None, str | None] = {}
    found: set[int] = set()
    for index, operation in enumerate(code.operations[:-1]):
        following = code.operations[index + 1]
        if operation.type == "read_state":
            read[_made_by(operation)] = _given(operation, "input")
        if operation.type != "slice_update" or following.type != "write_state":
            continue
        source, state = _given(operation, "x"), _given(following, "input")
        first = source in read and [*read.values()].count(state) == 1 == writes[state]
        only = read.get(source) == state and uses[str(source)] == 1
        if first and only and _given(following, "data") == _made_by(operation):
            found.add(index)
    return found


def _given(operation: Operation, name: str) -> str | None:
    """The name of the one value of a parameter; None where it is something else."""
    given = operation.inputs.get(name, ())
    return given[0] if len(given) == 1 and isinstance(given[0], str) else None


def _made_by(operation: Operation) -> str | None:
    """The name of the one result of an operator; None where there are others."""
    return operation.outputs[0][0] if len(operation.outputs) == 1 else None


def _names(operation: Operation) -> list[str]:
    return [each for given in operation.inputs.values() for each in given if isinstance(each, str)]


def _weights_of(operation: Operation) -> object | None:
    """What a constant or an expansion of constants is made of; None of anything else.

    Equal keys mean the same weights, in whatever function they stand.
    """
    if operation.type != "const" and not operation.type.startswith("constexpr_"):
        return None
    given = [
        (name, _identity(each), each.type)
        for name, several in sorted(operation.inputs.items())
        for each in several
        if isinstance(each, Constant)
    ]
    return None if len(given) != len(operation.inputs) else (operation.type, *given)


def _identity(constant: Constant) -> object:
    """Equal for equal numbers: a place in the file, or the numbers themselves."""
    if constant.offset is not None:
        return constant.offset
    return constant.value if isinstance(constant.value, str) else constant.value.tobytes()


def _numpy(value: Operand, *, copied: bool) -> Array:
    if isinstance(value, str):
        raise BundleError("function gives a word", got=value)
    return (value.clone() if copied else value).contiguous().numpy()
