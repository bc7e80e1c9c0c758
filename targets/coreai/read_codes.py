"""Integer codes read back from the assets of a bundle."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lorgnette.manifest import Manifest
from lorgnette.targets.target import StoredMatrix

if TYPE_CHECKING:
    from coreai._compiler.ir import OpView

Bytes = NDArray[np.uint8]


def read_codes(folder: Path, manifest: Manifest) -> Iterator[StoredMatrix]:
    """Every matrix that is stored as integers, one after the other.

    Args:
        folder: The bundle.
        manifest: Its manifest.
    """
    from coreai.authoring import AIModelAsset

    from lorgnette.targets.coreai.convert import NOTE
    from lorgnette.targets.coreai.graphs import graphs_of, operators_of, resource_name

    for graph in dict.fromkeys(component.graph for component in manifest.components):
        program = AIModelAsset.load(folder / graph).program
        said = json.loads((folder / graph / "metadata.json").read_bytes())
        constants = {
            resource_name(op): op
            for each in graphs_of(program).values()
            for op in operators_of(each)
            if resource_name(op)
        }
        for component, matrices in said["creatorDefinedMetadata"][NOTE].items():
            for name, (stored, columns) in matrices.items():
                yield _read(component, name, int(columns), stored, constants)


def _read(
    component: str, name: str, columns: int, stored: str, constants: Mapping[str, OpView]
) -> StoredMatrix:
    from lorgnette.targets.coreai.constants import tensor_type
    from lorgnette.targets.coreai.graphs import resource_bytes

    codes = constants[f"{stored}:codes"]
    held = tensor_type(codes.operation.result)
    rows, padded = held.shape
    kind = str(held.element_type)  # si4: signed, 4 bits
    bits = int(kind.lstrip("siu"))
    unpacked = unpack(resource_bytes(codes), bits, rows * padded).reshape(rows, padded)
    if kind.startswith("s"):
        unpacked ^= np.uint8(1 << (bits - 1))
    scales = np.ones((rows, 1), np.float32)
    if f"{stored}:scales" in constants:
        op = constants[f"{stored}:scales"]
        of_scales = tensor_type(op.operation.result)
        dtype = np.float16 if str(of_scales.element_type) == "f16" else np.float32
        scales = resource_bytes(op).view(dtype).astype(np.float32).reshape(of_scales.shape)
    return StoredMatrix(component, name, unpacked[:, :columns], scales, bits)


def unpack(packed: Bytes, bits: int, count: int) -> Bytes:
    """`count` numbers of `bits` bits, the first in the lowest bits of the first byte."""
    if bits == 8:
        return packed[:count].copy()
    spread = np.unpackbits(packed, bitorder="little")[: count * bits].reshape(count, bits)
    return np.packbits(spread, axis=1, bitorder="little")[:, 0]
