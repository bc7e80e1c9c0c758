"""Building an ONNX graph from an ExportedProgram, node by node."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from lorgnette.errors import ConfigError
from lorgnette.export.component import Component, TensorSpec
from lorgnette.quantize.scales import split_scales
from lorgnette.quantize.scheme import InputRange, QuantScheme, QuantTensor
from lorgnette.quantize.store import QuantizedSource
from lorgnette.targets.onnx.packing import HIGH_BIT, as_halves, pack_codes, read_as
from lorgnette.targets.onnx.weight_file import WeightFile

if TYPE_CHECKING:
    from torch.export import ExportedProgram

CONTRIB = "com.microsoft"
OPSET = {"": 21, CONTRIB: 1}
BROADCASTS = "broadcasts"
"""Note on a node whose operands are of different shapes; not written to the file."""
IR_VERSION = 10  # the newest that the oldest supported engine reads, with opset 21

DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
    torch.int32: ir.DataType.INT32,
    torch.int64: ir.DataType.INT64,
}

Attribute = int | float | str | Sequence[int]


class GraphBuilder:
    """The graph under construction: nodes, weights and constants.

    Args:
        component: What is lowered.
        source: Its weights, and how they are rounded.
        weights: Where they are stored.
        many_positions: Whether the graph is for hundreds of positions a call, which it multiplies
            with other codes of the same weights.
    """

    def __init__(
        self,
        component: Component,
        source: QuantizedSource,
        weights: WeightFile,
        *,
        many_positions: bool = False,
    ) -> None:
        """Starts an empty graph."""
        self.component = component
        self.many_positions = many_positions
        self.inputs = [_io_value(s) for s in (*component.inputs, *component.cache_inputs)]
        self.made_weights: dict[str, tuple[ir.Value, ...]] = {}
        """Further inputs by the matrix that they are of: what another graph makes of its codes."""
        self.operators: Counter[str] = Counter()
        self.weight_bytes: Counter[str] = Counter()
        self.kept_in_float: dict[str, str] = {}
        self.module = ""
        """The module that the next nodes are of, which their names begin with."""
        self._source = source
        self._weights = weights
        self._nodes: list[ir.Node] = []
        self._weight_nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._shared: dict[str, ir.Value] = {}

    def node(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Attribute] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
        of_weights: bool = False,
    ) -> list[ir.Value]:
        """Appends a node and returns its outputs; its name is `module/Operator_number`.

        Those that make one array of weights of another stand before all others. onnxruntime runs
        what a node needs in the reverse order of that in the file: where a multiplication needs
        both what came before it and weights, weights come last, and only those of one
        multiplication lie in memory.
        """
        number = len(self._nodes) + len(self._weight_nodes)
        made = ir.Node(
            domain,
            operator,
            inputs,
            attributes=ir.convenience.convert_attributes(attributes or {}),
            num_outputs=outputs,
            name=f"{self.module}/{operator}_{number}",
        )
        for index, value in enumerate(made.outputs):
            value.name = f"{made.name}_{index}"
        (self._weight_nodes if of_weights else self._nodes).append(made)
        return list(made.outputs)

    def shared(self, key: str, make: Callable[[], ir.Value]) -> ir.Value:
        """A value that the graph needs many times and computes once."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def constant(self, values: NDArray[np.generic]) -> ir.Value:
        """A small constant, kept inside the graph file; equal ones are shared."""
        name = f"const_{values.dtype}_{'x'.join(map(str, values.shape))}_{values.tobytes().hex()}"
        if name not in self._initializers:
            self._add_initializer(name, values.shape, ir.tensor(values, name=name))
        return self._initializers[name]

    def scheme(self, parameter: str) -> QuantScheme:
        """The planned scheme of a matrix."""
        return self._source.rule(parameter).scheme

    def columns(self, parameter: str) -> int:
        """The columns of a matrix."""
        return self._source.shapes[parameter][1]

    def rows(self, parameter: str) -> int:
        """The rows of a matrix."""
        return self._source.shapes[parameter][0]

    def keep_in_float(self, parameter: str, reason: str) -> None:
        """Tells that a weight stays float32, where the plan asked for something else."""
        rule = self._source.find_rule(parameter)
        if rule is not None and rule.scheme.bits != 32:
            self.kept_in_float[parameter] = reason

    def float_weight(self, parameter: str, dtype: type[np.floating] = np.float32) -> ir.Value:
        """A weight as it is, float32 or float16.

        Raises:
            ConfigError: A value is too large for float16.
        """

        def make() -> NDArray[np.generic]:
            with np.errstate(over="ignore"):  # told below
                array = self._source.unrounded(parameter).astype(dtype)
            if not np.isfinite(array).all():
                raise ConfigError(
                    f"weight '{parameter}' has values too large for float16",
                    where=self.component.name,
                    hint="use --quant fp32, int8 or int4",
                )
            return array

        shape = self._source.shapes[parameter]
        return self._stored(parameter, np.dtype(dtype).name, shape, make)

    def integer_weight(
        self, parameter: str, scheme: QuantScheme, shape: Callable[[int, int, int], tuple[int, ...]]
    ) -> tuple[ir.Value, ir.Value]:
        """A matrix as packed codes and scales.

        Args:
            parameter: Its name.
            scheme: How to quantise it.
            shape: Rows, groups and bytes a group to the shape of the codes in the graph.

        Returns:
            Codes (uint8) and scales (float32 `[rows, groups]`).
        """
        rows, columns = self._source.shapes[parameter]
        groups = scheme.groups(columns)
        codes = self._integer_part(
            parameter,
            scheme,
            "codes",
            shape(rows, groups, scheme.group_size * scheme.bits // 8),
            lambda made: pack_codes(made.codes, scheme.bits),
        )
        return codes, self._scales(parameter, scheme, (rows, groups))

    def column_weight(
        self, parameter: str, scheme: QuantScheme
    ) -> tuple[ir.Value, ir.Value | None, ir.Value]:
        """A symmetric matrix stored column by column, as integer kernels read it.

        Returns:
            Codes `[stored columns, rows]` (uint8; int8 of narrow codes, less the one that means
            zero; uint4 of 4 bits by channel; of 4 bits in groups
            int4, less the code that means zero), the multiples that scales are in groups (int8
            `[groups, rows]`, None of a scheme without), and one number a row (float32 `[rows]`),
            its scale or what the multiples are of.
        """
        rows, columns = self._source.shapes[parameter]
        part = partial(self._integer_part, parameter, scheme)
        shape = (scheme.padded(columns), rows)
        if scheme.bits == 8:
            codes = part("columns", shape, lambda made: _signed(made.codes, scheme).T)
            return codes, None, self._scales(parameter, scheme, (rows,))
        size = (-(-math.prod(shape) // 2),)
        if not scheme.group_size:
            codes = part("columns", size, lambda made: pack_codes(made.codes.T.reshape(1, -1), 4))
            read_as(codes, ir.DataType.UINT4, shape)
            return codes, None, self._scales(parameter, scheme, (rows,))
        codes = part(
            "columns", size, lambda made: pack_codes(made.codes.T.reshape(1, -1) ^ HIGH_BIT, 4)
        )
        read_as(codes, ir.DataType.INT4, shape)
        most, steps = scheme.most_steps, (scheme.groups(columns), rows)
        return (
            codes,
            part("column_steps", steps, lambda made: split_scales(made.scales, most)[0].T),
            part("rows", (rows,), lambda made: split_scales(made.scales, most)[1]),
        )

    def input_range(self, parameter: str) -> InputRange:
        """How calibration says that the inputs of a matrix are rounded.

        Raises:
            ConfigError: It says nothing.
        """
        found = self._source.codes(parameter).input_range
        if found is None:
            raise ConfigError(
                "no range is known of the inputs of a matrix",
                where=f"{self.component.name}/{parameter}",
                hint="static activations need calibration",
            )
        return found

    def _scales(self, parameter: str, scheme: QuantScheme, shape: tuple[int, ...]) -> ir.Value:
        """The scales of a matrix, float32; engines widen those of less bits once, as they load."""
        part = partial(self._integer_part, parameter, scheme)
        if scheme.scale_bits == 32:
            return part("scales", shape, lambda made: made.scales)

        def widen(narrow: ir.Value) -> ir.Value:
            (wide,) = self.node("Cast", [narrow], {"to": int(ir.DataType.FLOAT)}, of_weights=True)
            return wide

        def made_wide() -> ir.Value:
            if scheme.scale_bits == 16:
                return widen(part("scales", shape, lambda made: as_halves(made.scales)))
            most = scheme.most_steps
            steps = part("scales", shape, lambda made: split_scales(made.scales, most)[0])
            number = part("rows", (shape[0], 1), lambda made: split_scales(made.scales, most)[1])
            return self.node("Mul", [widen(steps), number], of_weights=True)[0]

        return self.shared(f"scales of {parameter}", made_wide)

    def cache_scale(self, name: str) -> ir.Value:
        """Steps of a KV cache of 8 bits by its name, float32 `[Hkv * Dh]`."""
        stored = f"{name}.scale"
        if stored not in self._initializers:
            steps = self._source.cache_scale(name)
            shape = (steps.size,)
            key = f"{self.component.name}/{stored}"
            tensor, written = self._weights.add(key, stored, shape, lambda: steps)
            self.weight_bytes["float32"] += written
            self._add_initializer(stored, shape, tensor)
        return self._initializers[stored]

    def zero_points(self, parameter: str, scheme: QuantScheme) -> list[ir.Value]:
        """The packed zero points of a matrix, uint8 `[rows, bytes]`; none of a symmetric scheme."""
        if scheme.symmetric:
            return []
        rows, columns = self._source.shapes[parameter]
        shape = (rows, scheme.zero_point_bytes(1, columns))
        return [
            self._integer_part(
                parameter,
                scheme,
                "zeros",
                shape,
                lambda made: pack_codes(made.zero_points, scheme.bits),
            )
        ]

    def _integer_part(
        self,
        parameter: str,
        scheme: QuantScheme,
        part: str,
        shape: tuple[int, ...],
        take: Callable[[QuantTensor], NDArray[np.generic]],
    ) -> ir.Value:
        """One array of a quantised matrix."""
        return self._stored(
            parameter,
            f"{scheme.form}.{part}",
            shape,
            lambda: take(self._source.codes(parameter)),
        )

    def finish(self, outputs: Sequence[ir.Value]) -> ir.Model:
        """Names the outputs and closes the graph."""
        specs = (*self.component.outputs, *self.component.cache_outputs)
        for value, spec in zip(outputs, specs, strict=True):
            value.name = spec.name
            value.dtype = DTYPES[spec.dtype]
            value.shape = ir.Shape(spec.shape)
        made = [value for values in self.made_weights.values() for value in values]
        return self.close([*self.inputs, *made], outputs)

    def close(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Model:
        """A model of what was built, with inputs and outputs as they are given."""
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=[*self._weight_nodes, *self._nodes],
            initializers=list(self._initializers.values()),
            opset_imports=OPSET,
            name=self.component.name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="lorgnette")

    def _stored(
        self,
        parameter: str,
        form: str,
        shape: tuple[int, ...],
        make: Callable[[], NDArray[np.generic]],
    ) -> ir.Value:
        name = f"{parameter}.{form}"
        if name not in self._initializers:
            key = f"{self._source.storage_key(parameter)}.{form}"
            tensor, written = self._weights.add(key, name, shape, make)
            self.weight_bytes[form.split(".", maxsplit=1)[0]] += written
            self._add_initializer(name, shape, tensor)
        return self._initializers[name]

    def _add_initializer(
        self, name: str, shape: tuple[int, ...], tensor: ir.TensorProtocol
    ) -> None:
        self._initializers[name] = ir.Value(
            name=name,
            const_value=tensor,
            shape=ir.Shape(shape),
            type=ir.TensorType(tensor.dtype),
        )


def _signed(codes: NDArray[np.uint8], scheme: QuantScheme) -> NDArray[np.generic]:
    """Narrow codes as signed numbers, less the one that means zero; others as they are."""
    return (codes ^ np.uint8(scheme.middle)).view(np.int8) if scheme.narrow else codes


def _io_value(spec: TensorSpec) -> ir.Value:
    return ir.Value(
        name=spec.name, shape=ir.Shape(spec.shape), type=ir.TensorType(DTYPES[spec.dtype])
    )


def build_graph(builder: GraphBuilder, program: ExportedProgram) -> ir.Model:
    """Translates every node of a program in order.

    Raises:
        ConfigError: An operator that this target has no translation for.
    """
    from lorgnette.targets.onnx.arguments import Parameter
    from lorgnette.targets.onnx.operators import TRANSLATIONS

    signature = program.graph_signature
    parameters = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    user_inputs = dict(zip(signature.user_inputs, builder.inputs, strict=True))
    known: dict[torch.fx.Node, object] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            known[node] = (
                Parameter(parameters[node.name])
                if node.name in parameters
                else user_inputs[node.name]
            )
        elif node.op == "call_function":
            translate = TRANSLATIONS.get(str(node.target))
            if translate is None:
                raise ConfigError(
                    f"operator '{node.target}' has no translation",
                    where=f"{builder.component.name}, target onnx",
                    hint="add it to targets/onnx/operators.py",
                )
            builder.module = module_of(node)
            known[node] = translate(builder, node, known)
        elif node.op == "output":
            outputs = [known[arg] for arg in node.args[0]]
    return builder.finish(outputs)  # type: ignore[arg-type]


def module_of(node: torch.fx.Node) -> str:
    """The path of the module that a traced node was written in, empty for the whole component."""
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
    path, _ = list(stack.values())[-1]
    return str(path)
