"""One component to one package: which functions it has, and what each takes and gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lorgnette.export.component import Component, TensorSpec
from lorgnette.export.trace import trace
from lorgnette.quantize.store import QuantizedSource
from lorgnette.targets.coreml.builder import FunctionBuilder, FunctionPlan, translate
from lorgnette.targets.coreml.mil import IOS18, Builder, Function, Var, types
from lorgnette.targets.coreml.save import save_package
from lorgnette.targets.coreml.weights import WeightStore

CHUNK = 64
"""Positions of one call of prefill, and tokens of one look-up: fixed, as the Neural Engine wants
it; calls that are not full are filled up."""
ALIGN = 32
"""The KV cache's positions are a multiple of this: 64 bytes of float16, as wide as the Neural
Engine's rows are in memory (Apple, "Deploying Transformers on the Apple Neural Engine", 2022)."""

Kind = Literal["input", "output", "state"]


@dataclass(frozen=True)
class Tensor:
    """An input, output or state of a function."""

    kind: Kind
    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Made:
    """A function that was built: its name, entry point and tensors."""

    name: str
    entry_point: str
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class Built:
    """One package on disk, and what is in it."""

    operators: dict[str, int]
    weight_bytes: dict[str, int]
    kept_in_float: dict[str, str]
    exceptions: tuple[str, ...]
    functions: tuple[Made, ...]


def capacity_for(context_length: int) -> int:
    """Positions of the KV cache: the context, and what the last call of prefill fills up."""
    return -(-(context_length + CHUNK - 1) // ALIGN) * ALIGN


def build_package(
    component: Component,
    source: QuantizedSource,
    folder: Path,
    *,
    context_length: int,
    half: bool,
) -> Built:
    """Lowers a component and writes it.

    Args:
        component: What is lowered.
        source: Its weights, read one by one while they are written.
        folder: The package to be made, ending in `.mlpackage`.
        context_length: The most positions of a decoder.
        half: Whether it computes in float16.
    """
    store = WeightStore()
    functions: dict[str, Function] = {}
    made: list[Made] = []
    kept: dict[str, str] = {}
    for name, entry_point, rows in _functions(component):
        plan = FunctionPlan(name, rows, capacity_for(context_length), half)
        function, builder = _build_function(component, source, store, plan)
        functions[name] = function
        made.append(Made(name, entry_point, _tensors(function)))
        kept |= builder.kept_in_float
    operators = save_package(functions, store, folder)
    return Built(
        operators=operators,
        weight_bytes=dict(sorted(store.weight_bytes.items())),
        kept_in_float=kept,
        exceptions=_exceptions(store.exceptions),
        functions=tuple(made),
    )


def _functions(component: Component) -> Sequence[tuple[str, str, int]]:
    """Name, entry point and positions of each function."""
    if component.cache_inputs:
        return (("prefill", "prefill", CHUNK), ("decode", "decode", 1))
    if "T" in component.dynamic_axes:
        point = component.entry_points[0]
        return ((point, point, CHUNK), (f"{point}_one", point, 1))
    return (("main", component.entry_points[0], 1),)


def _build_function(
    component: Component, source: QuantizedSource, store: WeightStore, plan: FunctionPlan
) -> tuple[Function, FunctionBuilder]:
    fixed = fix_axes(component, {"G": 1, "T": plan.rows, "S": plan.capacity})
    program = trace(fixed)
    # Names of a function are counted from its start, so that the same export gives the same bytes.
    Builder.name_count.clear()
    with Function(_placeholders(fixed, plan), IOS18) as function:
        builder = FunctionBuilder(fixed, source, store, plan, dict(function.inputs))
        cached = [_base(spec.name) for spec in fixed.cache_inputs]
        names = cached if plan.half else [f"{name}_in" for name in cached]
        builder.caches = [function.inputs[name] for name in names]
        if "tiles" in builder.inputs:
            tiles = builder.inputs["tiles"]
            builder.inputs["tiles"] = Builder.cast(x=tiles, dtype=builder.mil_dtype)
        outputs = translate(builder, program)
        for spec, value in zip(fixed.outputs, outputs, strict=True):
            value.name = spec.name
        for index, value in sorted(builder.updated.items()):
            value.name = f"{cached[index]}_out"
            outputs.append(value)
        function.set_outputs(outputs)
    return function, builder


def fix_axes(component: Component, sizes: Mapping[str, int]) -> Component:
    """The component with a number in the place of every dynamic axis."""

    def fix(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        return tuple(
            replace(spec, shape=tuple(sizes[a] if isinstance(a, str) else a for a in spec.shape))
            for spec in specs
        )

    return replace(
        component,
        inputs=fix(component.inputs),
        outputs=fix(component.outputs),
        cache_inputs=fix(component.cache_inputs),
        cache_outputs=fix(component.cache_outputs),
        dynamic_axes={},
    )


def _placeholders(component: Component, plan: FunctionPlan) -> dict[str, Var]:
    """What a function takes: integers as int32, the only ones that Core ML passes; its own floats.

    States are float16 by Core ML's rules, so a float32 cache is passed in and out.
    """
    floats = types.fp16 if plan.half else types.fp32
    made = {}
    for spec in component.inputs:
        kind = floats if spec.dtype.is_floating_point else types.int32
        made[spec.name] = Builder.TensorSpec(spec.shape, kind)
    if plan.name == "prefill":
        made["last_row"] = Builder.TensorSpec((1,), types.int32)
    for spec in component.cache_inputs:
        if plan.half:
            made[_base(spec.name)] = Builder.StateTensorSpec(spec.shape, types.fp16)
        else:
            made[spec.name] = Builder.TensorSpec(spec.shape, types.fp32)
    return made


def _base(name: str) -> str:
    return name.removesuffix("_in")


_NAMES = {"fp16": "float16", "fp32": "float32", "int32": "int32"}


def _tensors(function: Function) -> tuple[Tensor, ...]:
    found = []
    for name, var in function.inputs.items():
        state = types.is_state(var.sym_type)
        kind: Kind = "state" if state else "input"
        type_ = var.sym_type.wrapped_type() if state else var.sym_type
        found.append(_tensor(kind, name, type_))
    found += [_tensor("output", var.name, var.sym_type) for var in function.outputs]
    return tuple(found)


def _tensor(kind: Kind, name: str, type_: type) -> Tensor:
    primitive = types.builtin_to_string(type_.get_primitive())  # type: ignore[attr-defined]
    shape = tuple(int(size) for size in type_.get_shape())  # type: ignore[attr-defined]
    return Tensor(kind, name, _NAMES[primitive], shape)


def _exceptions(found: Mapping[str, set[str]]) -> tuple[str, ...]:
    return tuple(
        f"{what}: {len(names)} {'matrix' if len(names) == 1 else 'matrices'}"
        for what, names in sorted(found.items())
    )
