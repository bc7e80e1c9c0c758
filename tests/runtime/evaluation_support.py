"""Files of questions in VLMEvalKit's format, written by Python's csv module as pandas would."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.runtime.support import picture

Cells = Mapping[str, object]


def png(pixels: NDArray[np.uint8]) -> bytes:
    """The file of a picture."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def base64_of(data: bytes) -> str:
    """What stands in an image cell."""
    return base64.b64encode(data).decode("ascii")


def encoded_picture(seed: int = 0, height: int = 24, width: int = 32) -> str:
    """A small picture as an image cell."""
    return base64_of(png(picture(height, width, seed)))


def write_tsv(
    path: Path,
    rows: Sequence[Cells],
    columns: Sequence[str] | None = None,
    *,
    quote_all: bool = True,
) -> Path:
    """Writes rows; VLMEvalKit quotes every cell, pandas by itself only where it must."""
    names = list(columns or dict.fromkeys(name for row in rows for name in row))
    quoting: Any = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=quoting, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([[row.get(name, "") for name in names] for row in rows])
    return path


def row(index: object, **cells: object) -> dict[str, object]:
    """A row that can be used, but for what is given."""
    return {
        "index": index,
        "image": encoded_picture(),
        "question": "What is it?",
        "answer": "a dog",
        **cells,
    }
