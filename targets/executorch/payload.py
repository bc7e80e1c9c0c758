"""What lies in a delegate's payload: the graph that XNNPACK makes of it, as plain data."""

from __future__ import annotations

import hashlib
import json
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorgnette.targets.executorch.quantized import TokenLinear

XnnGraph = dict[str, Any]
"""Values and nodes by the names of executorch's schema of them."""


def read_graph(payload: bytes) -> XnnGraph:
    """The graph of a payload.

    Raises:
        ValueError: It is none.
    """
    import executorch.backends.xnnpack.serialization as schemas
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
    start = header.flatbuffer_offset
    with tempfile.TemporaryDirectory() as folder:
        schema, data = Path(folder, "schema.fbs"), Path(folder, "schema.bin")
        schema.write_bytes(resources.files(schemas).joinpath("schema.fbs").read_bytes())
        data.write_bytes(payload[start : start + header.flatbuffer_size])
        _flatc_decompile(folder, str(schema), str(data), ["--raw-binary"])
        found: XnnGraph = json.loads(Path(folder, "schema.json").read_bytes())
    return found


def tensor_of(value: dict[str, Any]) -> dict[str, Any]:
    """The tensor of a value, quantised or not."""
    inner: dict[str, Any] = value["xvalue_union"]
    found: dict[str, Any] = inner.get("tensor_value", inner)
    return found


def constant_keys(graph: XnnGraph) -> dict[str, int]:
    """By key of named data, the value of a graph that it is the content of."""
    keys = [entry["named_key"] for entry in graph["constant_data"]]
    found = {}
    for index, value in enumerate(graph["xvalues"]):
        at = tensor_of(value)["constant_buffer_idx"]
        if at:
            found[keys[at]] = index
    return found


def key_of(tensor: Tensor) -> str:
    """The key that executorch gives a constant: the digest of its bytes."""
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def code_key(piece: TokenLinear) -> str:
    """The key of a matrix's codes as XNNPACK is given them."""
    if piece.bits == 8:
        return key_of(piece.codes)
    nibbles = (piece.codes + 8).to(torch.uint8)
    return key_of(nibbles[:, 1::2] << 4 | nibbles[:, 0::2])


def find_pieces(
    pieces: dict[str, list[TokenLinear]], graphs: list[XnnGraph]
) -> dict[str, list[dict[str, int]]]:
    """Where each piece of each matrix lies.

    Returns:
        By matrix, for every piece the number of the delegate call, and of the values in its graph
        that are `codes` and, where scales are negative, `missing` or `signs`.

    Raises:
        RuntimeError: One lies nowhere: the library has rounded or cut it in a way of its own.
    """
    known = [constant_keys(graph) for graph in graphs]
    found = {}
    for name, parts in pieces.items():
        places = [_find_piece(piece, known, graphs) for piece in parts]
        if None in places:
            raise RuntimeError(f"matrix '{name}' is in no delegate with the codes it was given")
        found[name] = [place for place in places if place is not None]
    return found


def _find_piece(
    piece: TokenLinear, known: list[dict[str, int]], graphs: list[XnnGraph]
) -> dict[str, int] | None:
    wanted = {"codes": code_key(piece)}
    if piece.missing is not None:
        wanted["missing"] = key_of(piece.missing)
    for number, keys in enumerate(known):
        if all(key in keys for key in wanted.values()):
            place = {"delegate": number, **{part: keys[key] for part, key in wanted.items()}}
            if piece.signs is not None:
                place["signs"] = _factor_behind(graphs[number], place["codes"])
            return place
    return None


def _factor_behind(graph: XnnGraph, codes: int) -> int:
    """The value that the product with a matrix is multiplied by, element by element."""
    nodes = [(node["xnode_union_type"], node["xnode_union"]) for node in graph["xnodes"]]
    (product,) = [node["output_id"] for _, node in nodes if node.get("filter_id") == codes]
    for kind, node in nodes:
        if kind == "XNNMultiply" and node["input1_id"] == product:
            return int(node["input2_id"])
    raise RuntimeError("the signs of rows are not where they were written")
