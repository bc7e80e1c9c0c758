"""Sizes known before anything is made: weights of a scheme, the KV cache, tiles of a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorgnette.runtime.preprocess import grid_for
from lorgnette.spec import ModelSpec, Preprocess, TextSpec

if TYPE_CHECKING:
    from lorgnette.export.check import Parts
    from lorgnette.export.weights import WeightSource
    from lorgnette.quantize.plan import QuantPlan, Rule

FLOAT32_BYTES = 4
PICTURES = (("640x480", 640, 480), ("1:1", 1024, 1024))
"""Example pictures: name, width, height."""


def kv_bytes_per_token(text: TextSpec, bits: int = 32) -> int:
    """Keys and values of one position in every layer."""
    return text.layers * 2 * text.kv_heads * text.head_size * bits // 8


def tiles_of(width: int, height: int, preprocess: Preprocess) -> int:
    """Tiles of a picture, thumbnail included."""
    rows, cols = grid_for(height, width, preprocess)
    return rows * cols + 1 if rows else 1


def pictures(spec: ModelSpec, preprocess: Preprocess) -> list[dict[str, Any]]:
    """What example pictures cost in tiles and image tokens."""
    return [
        {
            "picture": name,
            "tiles": tiles_of(width, height, preprocess),
            "image_tokens": tiles_of(width, height, preprocess) * spec.image_tokens_per_tile,
        }
        for name, width, height in PICTURES
    ]


def memory(
    spec: ModelSpec,
    preprocess: Preprocess,
    context_length: int,
    weight_bytes: int,
    cache_bits: int = 32,
    *,
    prefill_weights: bool = False,
) -> dict[str, int]:
    """What a run holds at most: weights, a full KV cache, the image tokens of a square picture.

    With `prefill_weights`, the second form of the decoder's layers too that long prompts take.

    A prediction, and a lower bound: Python, the engine's code, its own copies of weights and the
    activations come on top.
    """
    kv = kv_bytes_per_token(spec.text, cache_bits) * context_length
    tokens = tiles_of(1024, 1024, preprocess) * spec.image_tokens_per_tile
    parts = {
        "weights": weight_bytes,
        "prefill_weights": prefill_weight_bytes(spec.text) if prefill_weights else 0,
        "kv_cache_at_full_context": kv,
        "image_tokens": tokens * spec.text.hidden_size * FLOAT32_BYTES,
    }
    return {**parts, "total": sum(parts.values())}


def prefill_weight_bytes(text: TextSpec) -> int:
    """What onnx-cpu makes of 4-bit codes for long prompts: a byte a number, a step for each row."""
    attention = text.heads * text.head_size
    rows = {
        "qkv": attention + 2 * text.kv_heads * text.head_size,
        "o": text.hidden_size,
        "gate_up": 2 * text.intermediate_size,
        "down": text.hidden_size,
    }
    columns = {
        "qkv": text.hidden_size,
        "o": attention,
        "gate_up": text.hidden_size,
        "down": text.intermediate_size,
    }
    layer = sum(count * (columns[name] + FLOAT32_BYTES) for name, count in rows.items())
    return text.layers * layer


def bundle_weight_bytes(
    sources: Mapping[str, WeightSource], matrices: Mapping[str, set[str]], plan: QuantPlan
) -> int:
    """Size of the weight file that a plan makes, its alignment included.

    Args:
        sources: The weights of each component.
        matrices: The parameters of each that the plan applies to; all others stay float32.
        plan: The plan.
    """
    from lorgnette.targets.onnx.weight_file import PAGE_BYTES, SMALL_ALIGN_BYTES

    stored: set[tuple[str, str]] = set()
    end = 0
    calibrated = _calibrated(sources, matrices, plan)
    for component, source in sources.items():
        for name, shape in source.shapes.items():
            origin = source.origin(name) or f"{component}/{name}"
            rule = plan.rule_for(component, name) if name in matrices[component] else None
            if rule is not None:  # a table takes its head's codes where calibration chooses them
                method = calibrated.get((origin, rule.scheme.form), rule.method)
                rule = rule._replace(method=method)
            for form, count in _blobs(shape, rule):
                if (origin, form) not in stored:
                    stored.add((origin, form))
                    end += -end % (PAGE_BYTES if count >= PAGE_BYTES else SMALL_ALIGN_BYTES) + count
    return end


def _calibrated(
    sources: Mapping[str, WeightSource], matrices: Mapping[str, set[str]], plan: QuantPlan
) -> dict[tuple[str, str], str]:
    """Origin and form to method, of matrices whose codes calibration chooses without a rescale."""
    found = {}
    for component, source in sources.items():
        for name in matrices[component]:
            origin, rule = source.origin(name), plan.rule_for(component, name)
            if origin is not None and rule.looks_at_inputs and rule.scaling == "none":
                found[origin, rule.scheme.form] = rule.method
    return found


def _blobs(shape: tuple[int, ...], rule: Rule | None) -> list[tuple[str, int]]:
    """What one parameter stores: the parts of an integer matrix, else one array."""
    if rule is None:
        return [("float32", math.prod(shape) * FLOAT32_BYTES)]
    scheme = rule.scheme
    if not scheme.is_integer:
        return [(scheme.form, scheme.stored_bytes(*shape))]
    form = f"{scheme.form}.{rule.method}"
    parts = [
        (f"{form}.codes", scheme.code_bytes(*shape)),
        (f"{form}.scales", scheme.scale_bytes(*shape)),
        (f"{form}.rows", scheme.row_scale_bytes(shape[0])),
        (f"{form}.zeros", scheme.zero_point_bytes(*shape)),
    ]
    return [(name, count) for name, count in parts if count]


def checkpoint_weight_bytes(parts: Parts) -> dict[str, int]:
    """Predicted size of the weight file under every named plan."""
    from lorgnette.export.matrices import matrix_names
    from lorgnette.quantize.plan import PLANS

    matrices = matrix_names(parts.components)
    return {
        name: bundle_weight_bytes(parts.sources, matrices, plan) for name, plan in PLANS.items()
    }
