"""Reading a saved package back: its program as plain data, weights still in their file.

Nothing here trusts the file: names, sizes and types are checked before anything of that size is
made, and no path but that of the one file of weights is followed.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lorgnette.errors import BundleError, MissingExtraError
from lorgnette.targets.coreml.blobs import TYPES, BlobFile

DATA = Path("Data") / "com.apple.CoreML"
WEIGHT_FILE = "@model_path/weights/weight.bin"
OPSET = "CoreML8"
MAX_MANIFEST_BYTES = 1 << 16
MAX_MODEL_BYTES = 1 << 26
MAX_ELEMENTS = 1 << 29
"""Elements of one value; the table of a model of 7B has a quarter of it."""
MAX_AXES = 6

_DTYPES = {
    1: "bool",
    2: "string",
    10: "float16",
    11: "float32",
    21: "int8",
    23: "int32",
    25: "int4",
    31: "uint8",
    35: "uint4",
    38: "uint6",
}
"""DataType of MIL.proto, those that are used here."""


Message: TypeAlias = Any
"""A message of protobuf: the package ships no types."""


@dataclass(frozen=True)
class ValueType:
    """What a value is."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Constant:
    """Numbers or text in the program, or an array in the file of weights."""

    type: ValueType
    value: NDArray[np.generic] | str
    """The numbers; none of what lies in the file."""
    offset: int | None = None


@dataclass(frozen=True)
class Operation:
    """One operator: what it takes by name or as a constant, and what it gives."""

    type: str
    inputs: Mapping[str, tuple[str | Constant, ...]]
    outputs: tuple[tuple[str, ValueType], ...]


@dataclass(frozen=True)
class FunctionCode:
    """One function of a program."""

    name: str
    inputs: Mapping[str, ValueType]
    states: Mapping[str, ValueType]
    operations: tuple[Operation, ...]
    outputs: Mapping[str, ValueType]


@dataclass(frozen=True)
class Package:
    """A package on disk: functions by name, and the file that their weights lie in."""

    path: Path
    functions: Mapping[str, FunctionCode]
    blobs: BlobFile

    def array(self, constant: Constant) -> NDArray[np.generic]:
        """The numbers of a constant."""
        if constant.offset is not None:
            return self.blobs.read(constant.offset, constant.type.dtype, constant.type.shape)
        if isinstance(constant.value, str):
            raise BundleError("text in the place of numbers", where=self.path)
        return constant.value


def read_package(path: Path) -> Package:
    """Reads a package.

    Raises:
        BundleError: Anything about it is not as it must be.
        MissingExtraError: coremltools or protobuf are not installed.
    """
    _check_manifest(path)
    model = _parse(path / DATA / "model.mlmodel")
    blobs = BlobFile(path / DATA / "weights" / "weight.bin")
    program = model.mlProgram
    functions = {
        name: _Reader(path, name).read(program.functions[name])
        for name in sorted(program.functions)
    }
    if not functions:
        raise BundleError("a package holds no function", where=path)
    return Package(path, functions, blobs)


def _check_manifest(path: Path) -> None:
    """What Core ML finds the files by must name the files that are read here."""
    file = path / "Manifest.json"
    if file.is_symlink() or not file.is_file() or file.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError("a package has no manifest of sensible size", where=path)
    try:
        manifest = json.loads(file.read_bytes())
        entries = manifest["itemInfoEntries"]
        root = entries[manifest["rootModelIdentifier"]]["path"]
        paths = sorted(entry["path"] for entry in entries.values())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError("a package's manifest is damaged", where=file) from error
    base = DATA.name
    if root != f"{base}/model.mlmodel" or paths != [root, f"{base}/weights"]:
        raise BundleError("a package's manifest names other files", where=file, got=paths)


def _parse(file: Path) -> Message:
    if file.is_symlink() or not file.is_file():
        raise BundleError("a package has no model", where=file)
    if file.stat().st_size > MAX_MODEL_BYTES:
        raise BundleError("a model is too large", where=file, wanted=f"<= {MAX_MODEL_BYTES}")
    messages = _messages()
    from google.protobuf.message import DecodeError

    model = messages.Model()
    try:
        model.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise BundleError("a model is damaged", where=file, got=error) from error
    if model.WhichOneof("Type") != "mlProgram":
        raise BundleError("a model is no ML program", where=file, got=model.WhichOneof("Type"))
    return model


def _messages() -> Message:
    """The messages of coremltools, without the rest of it, which takes ten seconds to import."""
    name = "_lorgnette_coreml_messages"
    if name not in sys.modules:
        found = importlib.util.find_spec("coremltools")
        if found is None or not found.submodule_search_locations:
            raise MissingExtraError(
                "reading a Core ML package needs coremltools",
                hint="pip install 'lorgnette[coreml]'",
            )
        package = types.ModuleType(name)
        package.__path__ = [str(Path(found.submodule_search_locations[0]) / "proto")]
        sys.modules[name] = package
    return importlib.import_module(f"{name}.Model_pb2")


class _Reader:
    """Turns one function of the program to plain data."""

    def __init__(self, path: Path, name: str) -> None:
        self.where = f"{path.name}, function '{name[:80]}'"
        self.name = name

    def read(self, function: Message) -> FunctionCode:
        """The function."""
        if function.opset != OPSET or list(function.block_specializations) != [OPSET]:
            raise self.error("function is of another opset", got=function.opset, wanted=OPSET)
        block = function.block_specializations[OPSET]
        inputs: dict[str, ValueType] = {}
        states: dict[str, ValueType] = {}
        known: dict[str, ValueType] = {}
        for each in function.inputs:
            is_state = each.type.WhichOneof("type") == "stateType"
            type_ = each.type.stateType.wrappedType if is_state else each.type
            place = states if is_state else inputs
            place[each.name] = known[each.name] = self.value_type(type_)
        operations = []
        for each in block.operations:
            operation = self.operation(each)
            self.check_names(operation, known)
            known |= dict(operation.outputs)
            operations.append(operation)
        if missing := [name for name in block.outputs if name not in known]:
            raise self.error("output is not computed", got=missing[0])
        outputs = {name: known[name] for name in block.outputs}
        return FunctionCode(self.name, inputs, states, tuple(operations), outputs)

    def operation(self, each: Message) -> Operation:
        """One operator; a constant's value becomes its only input."""
        if each.blocks:
            raise self.error("operator holds a block", got=each.type)
        outputs = tuple((out.name, self.value_type(out.type)) for out in each.outputs)
        if each.type == "const":
            value = self.constant(each.attributes["val"])
            if [type_ for _, type_ in outputs] != [value.type]:
                raise self.error("a constant is not of its type", got=outputs)
            return Operation(each.type, {"val": (value,)}, outputs)
        inputs = {
            name: tuple(self.binding(binding) for binding in each.inputs[name].arguments)
            for name in sorted(each.inputs)
        }
        return Operation(each.type, inputs, outputs)

    def check_names(self, operation: Operation, known: Mapping[str, ValueType]) -> None:
        """Every name must be given before it is used, and only once."""
        for used in operation.inputs.values():
            for name in used:
                if isinstance(name, str) and name not in known:
                    raise self.error("operator reads what nothing gives", got=name)
        for name, _ in operation.outputs:
            if name in known:
                raise self.error("a name is given twice", got=name)

    def binding(self, binding: Message) -> str | Constant:
        """A name or a constant."""
        if binding.WhichOneof("binding") == "name":
            return str(binding.name)
        return self.constant(binding.value)

    def constant(self, value: Message) -> Constant:
        """A constant; arrays of the file of weights stay there."""
        type_ = self.value_type(value.type)
        if value.WhichOneof("value") == "blobFileValue":
            blob = value.blobFileValue
            if blob.fileName != WEIGHT_FILE:
                raise self.error("a weight lies in another file", got=blob.fileName)
            if type_.dtype not in TYPES:
                raise self.error("a weight is of an unknown type", got=type_.dtype)
            return Constant(type_, np.empty(0), int(blob.offset))
        return Constant(type_, self.immediate(value.immediateValue.tensor, type_))

    def immediate(self, tensor: Message, type_: ValueType) -> NDArray[np.generic] | str:
        """Numbers that stand in the program itself."""
        kind, count = type_.dtype, math.prod(type_.shape)
        if kind == "string":
            if len(tensor.strings.values) != 1:
                raise self.error("text is not one", got=len(tensor.strings.values))
            return str(tensor.strings.values[0])
        if kind in ("float16", "int8", "uint8"):
            found = np.frombuffer(tensor.bytes.values, TYPES[kind].dtype)
        elif kind in ("bool", "float32", "int32"):
            field = {"bool": tensor.bools, "float32": tensor.floats, "int32": tensor.ints}[kind]
            found = np.array(field.values, kind)
        else:
            raise self.error("numbers of this type must lie in the file of weights", got=kind)
        if found.size != count:
            raise self.error("a constant is of another size", got=found.size, wanted=count)
        return found.reshape(type_.shape)

    def value_type(self, value: Message) -> ValueType:
        """What a value is: a tensor whose every size is known."""
        if value.WhichOneof("type") != "tensorType":
            raise self.error("value is no tensor", got=value.WhichOneof("type"))
        tensor = value.tensorType
        if tensor.dataType not in _DTYPES:
            raise self.error("value is of an unknown type", got=tensor.dataType)
        if any(d.WhichOneof("dimension") != "constant" for d in tensor.dimensions):
            raise self.error("a size is known only at run time")
        shape = tuple(int(d.constant.size) for d in tensor.dimensions)
        if len(shape) > MAX_AXES or math.prod(shape) > MAX_ELEMENTS or 0 in shape:
            raise self.error("value is of no sensible shape", got=shape)
        return ValueType(_DTYPES[tensor.dataType], shape)

    def error(self, what: str, *, got: object = None, wanted: object = None) -> BundleError:
        """A refusal, told where."""
        return BundleError(what, where=self.where, got=got, wanted=wanted)
