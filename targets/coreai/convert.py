"""Traced components to one asset: functions that share their constants."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coreai._compiler.ir import Attribute, F32Type, Location, Value
from coreai.authoring import AIProgram
from coreai.runtime import AIModelAssetMetadata
from torch import Tensor
from torch.export import Dim, ExportedProgram

from lorgnette.export.component import Component, TensorSpec
from lorgnette.manifest import FunctionEntry, TensorEntry
from lorgnette.quantize.store import QuantizedSource
from lorgnette.targets.coreai.composites import cached_attention, rms_norm
from lorgnette.targets.coreai.constants import Constants, StoredAs, constant, resource, tensor_type
from lorgnette.targets.coreai.graphs import in_order
from lorgnette.targets.coreai.library import core, coreai_torch
from lorgnette.targets.coreai.modules import PREFIX, stored_module
from lorgnette.targets.coreai.operators import NAMESPACE, decompositions

Values = dict[str, Value]
NARROW = {torch.int64: torch.int32}
"""Core AI has no numbers of 64 bits."""
NOTE = "lorgnette.matrices"
"""What an asset's metadata call the list of its matrices of codes."""
MIN_RESOURCE = 16
"""Elements of a constant that is kept apart from the operators; smaller ones stand among them."""


@dataclass(frozen=True)
class Function:
    """An entry point of an asset.

    Attributes:
        name: Its name there, and which of the component's entry points it is.
        component: What it computes.
        sizes: Sizes of the component's dynamic axes that are fixed here.
    """

    name: str
    component: Component
    sizes: Mapping[str, int]

    def shape(self, spec: TensorSpec) -> tuple[int | str, ...]:
        """A tensor's shape here: a str still names a dynamic axis."""
        return tuple(self.sizes.get(a, a) if isinstance(a, str) else a for a in spec.shape)

    def entry(self) -> FunctionEntry:
        """What it takes and gives: the component's tensors, caches as states, no int64."""

        def tensor(spec: TensorSpec) -> TensorEntry:
            dtype = str(NARROW.get(spec.dtype, spec.dtype)).removeprefix("torch.")
            return TensorEntry(name=state_name(spec), dtype=dtype, shape=self.shape(spec))  # type: ignore[arg-type]

        return FunctionEntry(
            name=self.name,
            entry_point=self.name,
            inputs=tuple(map(tensor, self.component.inputs)),
            outputs=tuple(map(tensor, self.component.outputs)),
            states=tuple(map(tensor, self.component.cache_inputs)),
        )


class _Converter(coreai_torch.TorchConverter):
    """The library's, with names of constants that depend on nothing but what they hold.

    Constants of equal numbers are one, in whatever functions they stand.
    """

    def __init__(self) -> None:
        super().__init__(mode=coreai_torch.TorchConverter.Mode.RELEASE)
        self._kept: dict[str, Attribute] = {}

    def _constant_from_tensor(self, tensor: Tensor) -> Value:
        if tensor.dtype != torch.float32 or tensor.numel() < MIN_RESOURCE:
            return super()._constant_from_tensor(tensor)
        array = tensor.detach().numpy()
        shape = tuple(tensor.shape)
        name = f"{shape} {hashlib.sha256(array.tobytes()).hexdigest()[:32]}"
        if name not in self._kept:
            self._kept[name] = resource(name, F32Type.get(), shape, array)
        return constant(self._kept[name])


def write_asset(
    path: Path,
    functions: Sequence[Function],
    sources: Mapping[str, QuantizedSource],
    constants: Constants,
    progress: Callable[[str], None],
) -> dict[str, dict[str, int]]:
    """Converts functions and writes them as one asset, whose constants they share.

    Args:
        path: Where; ends in `.aimodel`.
        functions: The entry points.
        sources: The parameters of their components.
        constants: Makes the constants of stored matrices.
        progress: Told about each function.

    Returns:
        For each function, by name, how often each operator stands in it.
    """
    converter = _Converter()
    _register(converter, constants)
    for function in functions:
        progress(f"trace {function.name}")
        component = function.component
        with _quiet():
            converter.add_exported_program(
                _trace(function, sources[component.name]),
                input_names=[spec.name for spec in component.inputs],
                output_names=[spec.name for spec in component.outputs],
                state_names=[state_name(spec) for spec in component.cache_inputs],
                entrypoint_name=function.name,
            )
    progress(f"convert {path.stem}")
    with _quiet():
        program = converter.to_coreai()
    operators = in_order(program, [function.name for function in functions])
    progress(f"write {path.name}")
    names = dict.fromkeys(function.component.name for function in functions)
    _save(program, path, {name: constants.stored(name) for name in names})
    return operators


def state_name(spec: TensorSpec) -> str:
    """The name of a cache as a state: `key_0` of the input `key_0_in`."""
    return spec.name.removesuffix("_in")


def _trace(function: Function, source: QuantizedSource) -> ExportedProgram:
    """The program of an entry point, its small parameters filled in."""
    component = function.component
    dims: dict[str, Dim] = {
        name: Dim(name, min=low, max=high)
        for name, (low, high) in component.dynamic_axes.items()
        if name not in function.sizes
    }

    # torch.export takes equal sizes for one, and 0 and 1 for constants.
    sizes = {name: 7 + 2 * index for index, name in enumerate(dims)}

    def example(spec: TensorSpec) -> Tensor:
        shape = [sizes[a] if isinstance(a, str) else a for a in function.shape(spec)]
        return torch.empty(shape, dtype=spec.dtype, device="meta")

    def dynamic(spec: TensorSpec) -> dict[int, Dim]:
        return {i: dims[a] for i, a in enumerate(function.shape(spec)) if isinstance(a, str)}

    inputs: list[Tensor | list[Tensor]] = [example(spec) for spec in component.inputs]
    shapes: list[object] = [dynamic(spec) for spec in component.inputs]
    if component.cache_inputs:
        inputs.append([example(spec) for spec in component.cache_inputs])
        shapes.append([dynamic(spec) for spec in component.cache_inputs])
    with torch.no_grad():
        program: ExportedProgram = torch.export.export(
            stored_module(component, source), tuple(inputs), dynamic_shapes=tuple(shapes)
        )
        program = program.run_decompositions(decompositions())
    for name in program.state_dict:
        program.state_dict[name] = source.tensor(name.removeprefix(PREFIX))
    return program


def _register(converter: coreai_torch.TorchConverter, constants: Constants) -> None:
    """Tells the converter what this target's own operators are."""

    def linear(values: Values, node: torch.fx.Node, location: Location) -> Value:
        x, matrix = values[_name(node, 0)], constants.matrix(str(node.args[1]), location)
        transposed = core.transpose(matrix, np.array([1, 0], np.uint32))
        return core.broadcasting_batch_matmul(x, transposed)

    def rows(values: Values, node: torch.fx.Node, location: Location) -> Value:
        table = constants.part(str(node.args[1]), str(node.args[2]), location)
        found = core.gather_nd(table, core.expand_dims(values[_name(node, 0)], [2]))
        return core.cast(found, np.float32)

    def write(values: Values, node: torch.fx.Node, location: Location) -> Value:
        cache, new, past = (values[_name(node, i)] for i in range(3))
        batch, heads, _, size = tensor_type(cache).shape
        length = core.slice_(core.get_shape(new), [2], [3], [1])
        end = core.broadcasting_add(past, core.cast(length, np.int32))
        start = core.concat(0, [[0], [0], past, [0]])
        stop = core.concat(0, [[batch], [heads], end, [size]])
        return core.slice_update(cache, start, stop, [1, 1, 1, 1], new)

    def attend(values: Values, node: torch.fx.Node, location: Location) -> Value:
        query, keys, cached, past = (values[_name(node, i)] for i in range(4))
        return cached_attention(query, keys, cached, past)

    def norm(values: Values, node: torch.fx.Node, location: Location) -> Value:
        x, weight = values[_name(node, 0)], values[_name(node, 2)]
        return rms_norm(x, weight, float(str(node.args[3])))

    # By default it would fall apart into six operators.
    converter.register_torch_lowering("aten::rms_norm.default", allow_override=True)(norm)
    for name, lowering in (
        ("stored_linear", linear),
        ("stored_rows", rows),
        ("attend", attend),
        ("write_positions", write),
    ):
        converter.register_torch_lowering(f"{NAMESPACE}::{name}.default")(lowering)


def _name(node: torch.fx.Node, index: int) -> str:
    argument = node.args[index]
    if not isinstance(argument, torch.fx.Node):
        raise TypeError(f"argument {index} of {node} is {argument}, not a tensor")
    return argument.name


def _save(program: AIProgram, path: Path, stored: Mapping[str, Mapping[str, StoredAs]]) -> None:
    """Writes the asset, with a note of where codes are and without the time of day."""
    asset = program.save_asset(path)
    note: dict[str, Any] = {
        component: {name: list(place) for name, place in matrices.items()}
        for component, matrices in stored.items()
    }

    def describe(metadata: AIModelAssetMetadata) -> None:
        metadata.creation_date = None
        metadata.set_custom(NOTE, note)

    asset.update_metadata(describe)
    said = path / "metadata.json"  # its keys come in another order each time
    said.write_text(json.dumps(json.loads(said.read_bytes()), indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what the converter prints off stdout, which belongs to the command line."""
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
