"""Golden data: one tiny picture and question, and what the reference makes of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from lorgnette.bundle import Bundle
from lorgnette.errors import BundleError
from lorgnette.runtime.preprocess import Tiles
from lorgnette.spec import Frozen

TEXT_FILE = "golden.json"
TENSOR_FILE = "golden.safetensors"


class GoldenText(Frozen, frozen=True):
    """The part of the golden data that is not tensors."""

    question: str
    tiles_sha256: str
    rows: int
    cols: int
    prompt_ids: tuple[int, ...]
    original_greedy_ids: tuple[int, ...]
    """The greedy answer of the original float32 weights."""
    rounding_image_tokens: float
    """What the scheme's rounding of weights costs: relative error of the image tokens."""
    rounding_logits: float
    """The same of the logits."""
    rounding_activations: float
    """What rounding activations to 8 bits costs the logits besides, as the reference emulates it;
    0 where the scheme rounds none."""
    rounding_activations_image_tokens: float = 0.0
    """The same of the image tokens."""


@dataclass(frozen=True, eq=False)
class Golden:
    """A picture, a question, and the reference's numbers for them.

    Attributes:
        text: Everything but the tensors.
        picture: uint8 `[H, W, 3]`.
        image_tokens: float32 `[G, N, D]`, of the weights as the scheme rounds them.
        logits: float32 `[K, V]`, likewise: behind the prompt, and behind the first K - 1 tokens
            of the original's greedy answer.
    """

    text: GoldenText
    picture: NDArray[np.uint8]
    image_tokens: NDArray[np.float32]
    logits: NDArray[np.float32]


def tiles_digest(tiles: Tiles) -> str:
    """Hex digest of the tiles' bytes."""
    return hashlib.sha256(tiles.pixels.data).hexdigest()


def write_golden(golden: Golden, folder: Path) -> None:
    """Writes the two files into a new folder."""
    folder.mkdir()
    text = msgspec.json.format(msgspec.json.encode(golden.text), indent=1)
    (folder / TEXT_FILE).write_bytes(text + b"\n")
    tensors: dict[str, NDArray[np.generic]] = {
        # safetensors writes the memory of an array as it lies, whatever its strides say.
        "picture": np.ascontiguousarray(golden.picture),
        "image_tokens": np.ascontiguousarray(golden.image_tokens),
        "logits": np.ascontiguousarray(golden.logits),
    }
    safetensors.numpy.save_file(tensors, folder / TENSOR_FILE)


def read_golden(bundle: Bundle) -> Golden:
    """Reads the golden data of a bundle.

    Raises:
        BundleError: It is damaged, or does not fit the manifest.
    """
    folder = bundle.manifest.golden.folder
    text_path = bundle.file(f"{folder}/{TEXT_FILE}")
    tensor_path = bundle.file(f"{folder}/{TENSOR_FILE}")
    try:
        text = msgspec.json.decode(text_path.read_bytes(), type=GoldenText)
        tensors = safetensors.numpy.load_file(tensor_path)
        golden = Golden(text, tensors["picture"], tensors["image_tokens"], tensors["logits"])
    except (msgspec.DecodeError, safetensors.SafetensorError, KeyError) as error:
        raise BundleError("golden data is damaged", where=bundle.path, got=error) from error
    _check_shapes(bundle, golden)
    return golden


def _check_shapes(bundle: Bundle, golden: Golden) -> None:
    """Refuses tensors that `verify` could not compare."""
    spec, text = bundle.manifest.spec, golden.text
    tiles = text.rows * text.cols + 1 if text.rows else 1
    tokens = (tiles, spec.image_tokens_per_tile, spec.text.hidden_size)
    for name, array, dtype, shape in (
        ("picture", golden.picture, np.uint8, (*golden.picture.shape[:2], 3)),
        ("image_tokens", golden.image_tokens, np.float32, tokens),
        ("logits", golden.logits, np.float32, (*golden.logits.shape[:1], spec.text.vocab_size)),
    ):
        if array.dtype != dtype or array.shape != shape:
            raise BundleError(
                f"golden tensor '{name}' does not fit the manifest",
                where=bundle.path,
                got=f"{array.dtype}{list(array.shape)}",
            )
    if not 1 <= len(golden.logits) <= len(text.original_greedy_ids):
        raise BundleError(
            "golden logits do not fit the golden answer",
            where=bundle.path,
            got=f"{len(golden.logits)} steps",
            wanted=f"1 to {len(text.original_greedy_ids)}",
        )
    positions = len(text.prompt_ids) + len(text.original_greedy_ids)
    if positions > bundle.manifest.context_length:
        raise BundleError(
            "golden data does not fit the context",
            where=bundle.path,
            got=f"{positions} tokens",
            wanted=f"<= {bundle.manifest.context_length}",
        )
