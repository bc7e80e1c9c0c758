"""From a program to a package on disk.

coremltools' exporter writes the program. Of its passes only the one that removes unused operators
is run: what the others would do is done by the translations or not wanted. The manifest is written
here, because coremltools draws its identifiers at random and the same export must give the same
bytes.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lorgnette.targets.coreml.mil import (
    PASS_REGISTRY,
    SPECIFICATION_VERSION,
    FeatureTypes_pb2,
    Function,
    MILProtoExporter,
    Model_pb2,
    Program,
    Var,
    types,
)
from lorgnette.targets.coreml.weights import DTYPES, WeightStore

AUTHOR = "com.apple.CoreML"
MODEL = f"{AUTHOR}/model.mlmodel"
WEIGHTS = f"{AUTHOR}/weights"
WEIGHT_FILE = "@model_path/weights/weight.bin"

_WRITERS = {
    "float32": "write_float_data",
    "float16": "write_fp16_data",
    "int32": "write_int32_data",
    "int8": "write_int8_data",
    "uint8": "write_uint8_data",
    "int4": "write_int4_data",
    "uint4": "write_uint4_data",
    "uint6": "write_uint6_data",
}
_SMALL = ("int4", "uint4", "uint6")
_TYPE_NAMES = {"fp16": "float16", "fp32": "float32"}


Message: TypeAlias = Any
"""A message of protobuf, or a type of coremltools: neither package ships types."""


class _Exporter(MILProtoExporter):  # type: ignore[misc]
    """coremltools' exporter, which here asks the store for the numbers of a weight."""

    store: WeightStore

    def get_milproto_value(self, var: Var) -> Message:
        """An array in the program or in the file: numbers of less than a byte always there."""
        if types.builtin_to_string(var.dtype) in _SMALL:
            return self.create_file_value(var)
        return super().get_milproto_value(var)

    def create_file_value(self, var: Var) -> Message:
        """Writes an array to the file of weights unless it is there, and refers to it."""
        key = var.op.weight_id or f"{var.op.enclosing_block.name}/{var.name}"
        if key not in self.weight_id_to_file_value:
            self.weight_id_to_file_value[key] = self._write(var)
        found = self.weight_id_to_file_value[key]
        shape = tuple(d.constant.size for d in found.type.tensorType.dimensions)
        if shape != var.shape:
            raise AssertionError(f"{key} has the shapes {shape} and {var.shape}")
        return found

    def _write(self, var: Var) -> Message:
        name = types.builtin_to_string(var.dtype)
        name = _TYPE_NAMES.get(name, name)
        made = self.store.numbers(var.op.weight_id) if var.op.weight_id else None
        array = np.ascontiguousarray(var.val if made is None else made, DTYPES[name]).reshape(-1)
        if array.size != np.prod(var.shape):
            raise AssertionError(f"{var.name} has {array.size} numbers for {var.shape}")
        if name == "float16":
            array = array.view(np.uint16)
        writer = self.get_blob_writer(self.get_weight_path(var.op))
        offset = getattr(writer, _WRITERS[name])(array)
        value = self.types_to_proto(var.sym_type)
        return Model_pb2.MIL__pb2.Value(
            type=value, blobFileValue={"fileName": WEIGHT_FILE, "offset": offset}
        )


def save_package(
    functions: dict[str, Function], store: WeightStore, folder: Path
) -> dict[str, int]:
    """Writes functions and their weights as one package.

    Args:
        functions: By name; the first is the default.
        store: Their weights.
        folder: What is made, ending in `.mlpackage`.

    Returns:
        How often each operator stands in the functions together; constants are not counted.
    """
    program = Program()
    program.default_function_name = next(iter(functions))
    program.export_as_multifunction = len(functions) > 1
    for name, function in functions.items():
        program.add_function(name, function)
    PASS_REGISTRY["common::dead_code_elimination"](program)
    data = folder / "Data" / AUTHOR
    (data / "weights").mkdir(parents=True)
    exporter = _Exporter(program, str(data / "weights"), SPECIFICATION_VERSION)
    exporter.store = store
    exporter.get_blob_writer(str(data / "weights" / "weight.bin"))  # there even if it stays empty
    model = Model_pb2.Model(specificationVersion=SPECIFICATION_VERSION)
    model.mlProgram.CopyFrom(exporter.export())
    _describe(model.description, functions)
    (data / "model.mlmodel").write_bytes(model.SerializeToString(deterministic=True))
    _write_manifest(folder)
    return _count(model)


def _describe(description: Message, functions: dict[str, Function]) -> None:
    """What a caller must pass; coremltools has one form for one function, another for several."""
    if len(functions) == 1:
        _describe_function(description, next(iter(functions.values())))
        return
    description.defaultFunctionName = next(iter(functions))
    for name, function in functions.items():
        _describe_function(description.functions.add(name=name), function)


def _describe_function(description: Message, function: Function) -> None:
    for name, var in function.inputs.items():
        if types.is_state(var.sym_type):
            array = description.state.add(name=name).type.stateType.arrayType
            _describe_array(array, var.sym_type.wrapped_type())
        else:
            _describe_array(description.input.add(name=name).type.multiArrayType, var.sym_type)
    for var in function.outputs:
        _describe_array(description.output.add(name=var.name).type.multiArrayType, var.sym_type)


def _describe_array(array: Message, type_: Message) -> None:
    name = types.builtin_to_string(type_.get_primitive())
    kind = _TYPE_NAMES.get(name, name).upper()
    array.dataType = FeatureTypes_pb2.ArrayFeatureType.ArrayDataType.Value(kind)
    array.shape.extend(int(size) for size in type_.get_shape())


def _write_manifest(folder: Path) -> None:
    def item(name: str, path: str, description: str) -> tuple[str, dict[str, str]]:
        made = str(uuid.uuid5(uuid.NAMESPACE_URL, path)).upper()
        return made, {
            "author": AUTHOR,
            "description": description,
            "name": name,
            "path": path,
        }

    model, model_entry = item("model.mlmodel", MODEL, "CoreML Model Specification")
    weights, weights_entry = item("weights", WEIGHTS, "CoreML Model Weights")
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {model: model_entry, weights: weights_entry},
        "rootModelIdentifier": model,
    }
    (folder / "Manifest.json").write_text(json.dumps(manifest, indent=4) + "\n")


def _count(model: Message) -> dict[str, int]:
    found: dict[str, int] = {}
    for operation in _operations(model):
        if operation.type != "const":
            found[operation.type] = found.get(operation.type, 0) + 1
    return dict(sorted(found.items()))


def _operations(model: Message) -> Iterable[Message]:
    for function in model.mlProgram.functions.values():
        for block in function.block_specializations.values():
            yield from block.operations
