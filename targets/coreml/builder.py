"""Building one function of a Core ML program from an ExportedProgram, node by node."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray

from lorgnette.errors import ConfigError
from lorgnette.export.component import Component
from lorgnette.quantize.scheme import QuantScheme
from lorgnette.quantize.store import QuantizedSource
from lorgnette.targets.coreml.mil import Var
from lorgnette.targets.coreml.weights import WeightStore

if TYPE_CHECKING:
    from torch.export import ExportedProgram

MAX_AXES = 5
"""Core ML has no tensors of more."""


@dataclass(frozen=True)
class Parameter:
    """A weight that no value stands for yet: the operator decides how it is stored."""

    name: str


@dataclass(frozen=True)
class Cache:
    """A key or value cache, by its place among the component's."""

    index: int


Known = Mapping[torch.fx.Node, object]
Translation = Callable[["FunctionBuilder", torch.fx.Node, Known], object]


@dataclass(frozen=True)
class FunctionPlan:
    """What a function is made for.

    Attributes:
        name: Its name.
        rows: Positions T of one call.
        capacity: Positions S of the KV cache, and rows of the rotary tables.
        half: Whether it computes in float16.
    """

    name: str
    rows: int
    capacity: int
    half: bool


@dataclass
class FunctionBuilder:
    """The function under construction; `coremltools` holds the operators themselves.

    Attributes:
        component: What is lowered.
        source: Its weights, and how they are rounded.
        store: Where they are kept for writing.
        plan: What the function is made for.
        inputs: Its inputs by name.
        caches: The KV cache: states, or inputs where it is passed in and out.
        updated: The caches as the function leaves them, where they are passed in and out.
        kept_in_float: Matrices that stay float against the plan, with the reason.
    """

    component: Component
    source: QuantizedSource
    store: WeightStore
    plan: FunctionPlan
    inputs: dict[str, Var]
    caches: list[Var] = field(default_factory=list)
    updated: dict[int, Var] = field(default_factory=dict)
    kept_in_float: dict[str, str] = field(default_factory=dict)
    _shared: dict[str, Var] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """What it computes in, as `weights.DTYPES` names it."""
        return "float16" if self.plan.half else "float32"

    @property
    def mil_dtype(self) -> str:
        """The same as `cast` names it."""
        return "fp16" if self.plan.half else "fp32"

    def number(self, value: float) -> NDArray[np.generic]:
        """A number in the type that the function computes in."""
        return np.array(value, self.dtype)[()]

    def scheme(self, parameter: str) -> QuantScheme:
        """The planned scheme of a matrix."""
        return self.source.rule(parameter).scheme

    def columns(self, parameter: str) -> int:
        """The columns of a matrix."""
        return self.source.shapes[parameter][1]

    def shared(self, key: str, make: Callable[[], Var]) -> Var:
        """A value that the function needs many times and computes once."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def keep_in_float(self, parameter: str, reason: str) -> None:
        """Tells that a weight stays float, where the plan asked for integers."""
        rule = self.source.find_rule(parameter)
        if rule is not None and rule.scheme.is_integer:
            self.kept_in_float[parameter] = reason

    def constant(
        self,
        name: str,
        part: str,
        dtype: str,
        shape: tuple[int, ...],
        make: Callable[[], NDArray[np.generic]],
        form: str,
        *,
        key: str | None = None,
    ) -> Var:
        """An array that belongs to a weight; computed when the package is written.

        Args:
            name: The weight's.
            part: What of it, as the end of the constant's name and of its key.
            dtype: A name of `weights.DTYPES`.
            shape: The array's.
            make: Gives the numbers.
            form: What its bytes are counted as.
            key: What the numbers are, if not that part of that weight.
        """
        stored = key or f"{self.source.storage_key(name)}.{part}"
        full = mil_name(name) + ("" if part in ("float16", "float32") else f"__{part}")
        return self.shared(
            f"constant {full}",
            lambda: self.store.constant(full, stored, dtype, shape, make, form=form),
        )

    def float_weight(self, parameter: str) -> Var:
        """A weight as it is, in the type that the function computes in.

        Raises:
            ConfigError: A value is too large for float16; raised as the package is written.
        """
        shape = tuple(self.source.shapes[parameter])
        return self.constant(
            parameter,
            self.dtype,
            self.dtype,
            shape,
            lambda: to_float(
                self.source.tensor(parameter).numpy(), self.dtype, self.where(parameter)
            ),
            self.dtype,
        )

    def zeros(self, size: int) -> Var:
        """A bias of nothing."""
        return self.shared(
            f"zeros {size}",
            lambda: self.store.constant(
                f"zeros_{size}",
                f"zeros of {self.dtype} {size}",
                self.dtype,
                (size,),
                lambda: np.zeros(size, self.dtype),
                form=self.dtype,
            ),
        )

    def where(self, parameter: str) -> str:
        """A weight's place, for errors."""
        return f"{self.component.name}/{parameter}"


def mil_name(parameter: str) -> str:
    """A parameter's name as MIL allows it: dots become two underscores, which none has.

    Raises:
        ConfigError: The way back would be unclear.
    """
    if "__" in parameter:
        raise ConfigError("a parameter's name holds two underscores", got=parameter)
    return parameter.replace(".", "__")


def to_float(values: NDArray[np.float32], dtype: str, where: str) -> NDArray[np.generic]:
    """Values in a float type.

    Raises:
        ConfigError: One is too large for it.
    """
    with np.errstate(over="ignore"):  # told below
        made = values.astype(dtype)
    if not np.isfinite(made).all():
        raise ConfigError(
            "a weight has values too large for float16", where=where, hint="use --quant fp32"
        )
    return made


def graph_value(builder: FunctionBuilder, known: Known, argument: object) -> Var:
    """The value of an argument: computed, a float weight, or a number."""
    if isinstance(argument, torch.fx.Node):
        argument = known[argument]
    if isinstance(argument, Var):
        return argument
    if isinstance(argument, Parameter):
        return builder.float_weight(argument.name)
    if isinstance(argument, int | float):
        return builder.number(argument)
    raise ConfigError("argument has no value", where=builder.component.name, got=argument)


def weight_name(builder: FunctionBuilder, known: Known, argument: object) -> str:
    """The name of the weight that an argument is.

    Raises:
        ConfigError: It is computed.
    """
    found = known[argument] if isinstance(argument, torch.fx.Node) else argument
    if not isinstance(found, Parameter):
        raise ConfigError("operand is not a weight", where=builder.component.name, got=argument)
    return found.name


def traced_shape(argument: object) -> tuple[int, ...]:
    """The shape of an argument in the traced program, `()` of a number."""
    if not isinstance(argument, torch.fx.Node):
        return ()
    return tuple(int(size) for size in argument.meta["val"].shape)


def translate(builder: FunctionBuilder, program: ExportedProgram) -> list[Var]:
    """Translates every node of a program in order; returns its outputs, caches left out.

    Raises:
        ConfigError: An operator that this target has no translation for, or more than five axes.
    """
    from lorgnette.targets.coreml.operators import TRANSLATIONS

    signature = program.graph_signature
    parameters = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    named = [spec.name for spec in builder.component.inputs]
    values: list[object] = [builder.inputs[name] for name in named]
    values += [Cache(index) for index in range(len(builder.component.cache_inputs))]
    user_inputs = dict(zip(signature.user_inputs, values, strict=True))
    known: dict[torch.fx.Node, object] = {}
    outputs: Sequence[torch.fx.Node] = ()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            name = parameters.get(node.name)
            known[node] = Parameter(name) if name is not None else user_inputs[node.name]
        elif node.op == "call_function":
            found = TRANSLATIONS.get(str(node.target))
            if found is None:
                raise ConfigError(
                    f"operator '{node.target}' has no translation",
                    where=f"{builder.component.name}, target coreml",
                    hint="add it to targets/coreml/operators.py",
                )
            known[node] = found(builder, node, known)
            _check_axes(builder, node, known[node])
        elif node.op == "output":
            outputs = cast("Sequence[torch.fx.Node]", node.args[0])
    made = [known[node] for node in outputs]
    return [value for value in made if isinstance(value, Var)]


def _check_axes(builder: FunctionBuilder, node: torch.fx.Node, made: object) -> None:
    if isinstance(made, Var) and made.rank > MAX_AXES:
        raise ConfigError(
            "a tensor has too many axes for Core ML",
            where=f"{builder.component.name} {node}",
            got=made.rank,
            wanted=f"<= {MAX_AXES}",
        )
