"""Writes preprocess_vectors.json: what transformers' image processor makes of pictures.

    python tests/golden/preprocess_make.py

Any runtime, in any language, can be checked against it: the digest is over the uint8 tiles
[G, 3, tile, tile]. The drawn pictures follow from the formula in `drawn` alone.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import PIL
import transformers
from PIL import Image
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

FOLDER = Path(__file__).parent
PICTURES = (
    "preprocess_chelsea.png",
    "preprocess_clock_motion.png",
    "preprocess_text.png",
    "drawn 1x1",
    "drawn 640x427",
    "drawn 300x1000",
    "drawn 3x700",
)
SETTINGS = (
    (512, 2048, True),
    (384, 1536, True),
    (512, 512, True),
    (64, 192, True),
    (64, 99, False),
)


def drawn(width: int, height: int) -> np.ndarray:
    """uint8[height, width, 3]: byte i of the picture is bits 16 to 23 of i * i * 2654435761."""
    index = np.arange(height * width * 3, dtype=np.uint64)
    values = index * index * np.uint64(2654435761)
    return (values >> np.uint64(16) & np.uint64(255)).astype(np.uint8).reshape(height, width, 3)


def picture(name: str) -> Image.Image:
    """A file of this folder or `drawn WIDTHxHEIGHT`."""
    if name.startswith("drawn "):
        width, height = map(int, name.removeprefix("drawn ").split("x"))
        return Image.fromarray(drawn(width, height))
    return Image.open(FOLDER / name)


def vector(name: str, tile: int, longest_edge: int, split: bool) -> dict[str, object]:
    """One answer of the reference. Without normalising, its floats are the tiles' bytes."""
    processor = Idefics3ImageProcessorPil(
        size={"longest_edge": longest_edge},
        max_image_size={"longest_edge": tile},
        do_image_splitting=split,
        do_rescale=False,
        do_normalize=False,
        return_row_col_info=True,
    )
    answer = processor(images=[picture(name)], return_tensors="np")
    values = np.asarray(answer.pixel_values[0])
    pixels = values.astype(np.uint8)
    if not np.array_equal(pixels, values):
        raise SystemExit(f"{name}: the reference did not keep bytes")
    middle = tile // 2
    return {
        "picture": name,
        "tile_size": tile,
        "longest_edge": longest_edge,
        "split": split,
        "rows": answer.rows[0][0],
        "cols": answer.cols[0][0],
        "tiles": len(pixels),
        "first8": pixels[0, 0, 0, :8].tolist(),
        "last_middle8": pixels[-1, 0, middle, middle : middle + 8].tolist(),
        "pixels_sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
    }


def main() -> None:
    """Writes the file."""
    document = {
        "made_with": f"transformers {transformers.__version__}, Pillow {PIL.__version__}",
        "resample": "lanczos",
        "vectors": [vector(name, *setting) for name in PICTURES for setting in SETTINGS],
    }
    text = json.dumps(document, indent=1) + "\n"
    (FOLDER / "preprocess_vectors.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
