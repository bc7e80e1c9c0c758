"""Reads safetensors with numpy alone, bfloat16 included."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def read_weights(file: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Every tensor of a file as float32, one after the other."""
    import numpy as np

    with file.open("rb") as source:
        size = int.from_bytes(source.read(8), "little")
        header: dict[str, Any] = json.loads(source.read(size))
    header.pop("__metadata__", None)
    data = np.memmap(file, np.uint8, "r", offset=8 + size)
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        raw = np.asarray(data[start:end])
        if entry["dtype"] == "BF16":
            values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = raw.view({"F32": np.float32, "F16": np.float16}[entry["dtype"]])
        yield name, values.astype(np.float32).reshape(entry["shape"])
