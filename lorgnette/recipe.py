"""What a user asks for: one checkpoint, one target, one way to make it small."""

from __future__ import annotations

from lorgnette.spec import Frozen


class Recipe(Frozen, frozen=True):
    """The choices of an export; written into the manifest as they were made."""

    target: str = "onnx-cpu"
    quant: str = "fp32"
    context_length: int | None = None
    """KV cache capacity in tokens; None takes what the model was trained for, up to 8192."""
    longest_edge: int | None = None
    """Longest side of a picture in pixels before tiling; None takes the published size."""
    max_tiles: int | None = None
    """The most tiles that one picture may become; another way to say `longest_edge`."""
    split: bool | None = None
    """Whether pictures are cut into tiles; None takes what the checkpoint says."""
