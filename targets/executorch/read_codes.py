"""Reads the integer codes of a written `.pte` back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lorgnette.manifest import Manifest
from lorgnette.targets.executorch.lowering import MATRICES_FILE
from lorgnette.targets.executorch.payload import XnnGraph, read_graph, tensor_of
from lorgnette.targets.executorch.program import METHODS
from lorgnette.targets.executorch.quantized import LEAST_SCALE, MIDDLE
from lorgnette.targets.target import StoredMatrix

if TYPE_CHECKING:
    from executorch.exir._serialize._program import PTEFile

Float = NDArray[np.float32]
GATHER = {"quantized_decomposed::embedding_4bit": 4, "quantized_decomposed::embedding_byte": 8}
"""Operators that look rows up in a table of codes, and its bits."""


def read_codes(folder: Path, manifest: Manifest) -> Iterator[StoredMatrix]:
    """Every matrix that is stored as integers, in the order of components.

    Args:
        folder: The bundle.
        manifest: Its manifest.
    """
    from executorch.exir._serialize._program import deserialize_pte_binary

    places = json.loads((folder / MATRICES_FILE).read_text(encoding="utf-8"))
    path = folder / manifest.component("decoder").graph
    file = deserialize_pte_binary(path.read_bytes())
    for component, method in METHODS.items():
        reader = _MethodReader(file, method)
        if component == "token_embedding":
            yield from reader.tables(component, "table.weight")
        for name, pieces in places[component].items():
            read = [reader.piece(place) for place in pieces]
            yield StoredMatrix(
                component=component,
                name=name,
                codes=np.concatenate([codes for codes, _, _ in read]),
                scales=np.concatenate([scales for _, scales, _ in read]),
                bits=read[0][2],
            )


class _MethodReader:
    """One method of a file."""

    def __init__(self, file: PTEFile, method: str) -> None:
        self._file = file
        (self._plan,) = [plan for plan in file.program.execution_plan if plan.name == method]
        calls = [each.instr_args for chain in self._plan.chains for each in chain.instructions]
        self._kernels = [call for call in calls if hasattr(call, "op_index")]
        self._delegates = [call for call in calls if hasattr(call, "delegate_index")]
        self._graphs: dict[int, XnnGraph] = {}

    def piece(self, place: dict[str, int]) -> tuple[NDArray[np.uint8], Float, int]:
        """Codes, scales and bits of one piece, with the signs that our scales have."""
        graph = self._graph(place["delegate"])
        value = graph["xvalues"][place["codes"]]
        rows, columns = tensor_of(value)["dims"]
        bits = 8 if tensor_of(value)["datatype"] == "xnn_datatype_qcint8" else 4
        raw = np.frombuffer(
            self._constant(graph, tensor_of(value)["constant_buffer_idx"]), np.uint8
        )
        if bits == 8:
            codes = raw.reshape(rows, columns) + np.uint8(MIDDLE[8])
        else:
            codes = np.stack([raw & 15, raw >> 4], axis=-1).reshape(rows, columns)
        scales = self._scales(graph, value, rows)
        if "missing" in place:
            missing = tensor_of(graph["xvalues"][place["missing"]])["constant_buffer_idx"]
            turned = np.frombuffer(self._constant(graph, missing), np.float32) != 0
            turned = turned.reshape(scales.shape)
            wide = turned.repeat(columns // scales.shape[1], axis=1)
            codes = np.where(wide, 15 - codes, codes)
            scales = np.where(turned, -scales, scales)
        if "signs" in place:
            scales = scales * self._input(place["delegate"], place["signs"])[:, None]
        scales[np.abs(scales) <= LEAST_SCALE * 1.01] = 0
        return codes.astype(np.uint8), scales.astype(np.float32), bits

    def tables(self, component: str, name: str) -> Iterator[StoredMatrix]:
        """The table that rows are looked up in, where it is of integers."""
        for call in self._kernels:
            bits = GATHER.get(self._plan.operators[call.op_index].name)
            if bits is None:
                continue
            raw, scales = self._value(call.args[0]), self._value(call.args[1])
            if bits == 8:
                codes = raw.view(np.uint8) + np.uint8(MIDDLE[8])
            else:
                codes = np.stack([raw >> 4, raw & 15], axis=-1).reshape(len(raw), -1)
            yield StoredMatrix(
                component=component, name=name, codes=codes, scales=scales, bits=bits
            )

    def _graph(self, number: int) -> XnnGraph:
        if number not in self._graphs:
            processed = self._plan.delegates[self._delegates[number].delegate_index].processed
            data = self._file.program.backend_delegate_data[processed.index].data
            self._graphs[number] = read_graph(bytes(data))
        return self._graphs[number]

    def _constant(self, graph: XnnGraph, index: int) -> bytes:
        """The bytes of a constant of a delegate, which are named data of the file."""
        named = self._file.named_data
        if named is None:
            raise ValueError("the file has no named data")
        entry = named.pte_data[graph["constant_data"][index]["named_key"]]
        return bytes(named.buffers[entry.buffer_index])

    def _scales(self, graph: XnnGraph, value: dict[str, Any], rows: int) -> Float:
        quant = value["xvalue_union"]["quant_params"]
        raw = self._constant(graph, quant["scale_buffer_idx"])
        if value["xvalue_union"]["quant_params_type"] == "PerChannelGroupQuant":
            wide = np.frombuffer(raw, np.uint16).astype(np.uint32) << 16  # bfloat16
            return wide.view(np.float32).reshape(rows, -1)
        return np.frombuffer(raw, np.float32).reshape(rows, 1)

    def _input(self, delegate: int, value: int) -> Float:
        """A constant that a delegate is given as an input."""
        tensor = tensor_of(self._graph(delegate)["xvalues"][value])
        return self._value(self._delegates[delegate].args[tensor["external_id"]]).reshape(-1)

    def _value(self, index: int) -> NDArray[Any]:
        """A constant tensor of the method."""
        tensor: Any = self._plan.values[index].val
        kinds: Sequence[tuple[str, type]] = (
            ("FLOAT", np.float32),
            ("BYTE", np.uint8),
            ("CHAR", np.int8),
        )
        kind = dict(kinds)[tensor.scalar_type.name]
        raw = self._file.program.constant_buffer[tensor.data_buffer_idx].storage
        return np.frombuffer(bytes(raw), kind).reshape(tensor.sizes)
