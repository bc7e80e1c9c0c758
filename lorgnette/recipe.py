"""What a user asks for: one checkpoint, one target, one way to make it small."""

from __future__ import annotations

from lorgnette.spec import Frozen


class PlanRule(Frozen, frozen=True):
    """A rule of a plan file, word for word; `quantize/plan_file.py` says what is allowed."""

    select: str
    bits: int
    group: int | str | None = None
    symmetric: bool | None = None
    activations: str | None = None
    method: str | None = None
    scaling: str | None = None
    palette: bool | None = None
    rows: int | None = None
    scale_bits: int | None = None
    narrow: bool | None = None


class PlanText(Frozen, frozen=True):
    """A quantisation plan as plain data, as a plan file says it: no path, no machine in it."""

    name: str
    rule: tuple[PlanRule, ...]
    summary: str = ""
    rotate: bool = False
    cache_bits: int = 32
    max_kl: float | None = None
    min_same_answer: float | None = None


class Recipe(Frozen, frozen=True):
    """The choices of an export; written into the manifest as they were made."""

    target: str = "onnx-cpu"
    quant: str = "fp32"
    """A named plan, or the name of `plan`."""
    context_length: int | None = None
    """KV cache capacity in tokens; None takes what the model was trained for, up to 8192."""
    longest_edge: int | None = None
    """Longest side of a picture in pixels before tiling; None takes the published size."""
    max_tiles: int | None = None
    """The most tiles that one picture may become; another way to say `longest_edge`."""
    split: bool | None = None
    """Whether pictures are cut into tiles; None takes what the checkpoint says."""
    plan: PlanText | None = None
    """The rules of a plan file; None takes the plan that `quant` names."""
    max_fallback: int | None = None
    """The most operators that may run outside the target's delegate; None allows any number."""
