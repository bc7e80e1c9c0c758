"""Composite operators: an engine takes them whole, or as the graph that defines them."""

from __future__ import annotations

import coreai.authoring  # noqa: F401 - the dialect can be imported only behind it
from coreai._compiler.dialects import coreai as core
from coreai._compiler.ir import Value
from coreai_torch import generate_composite_decl

from lorgnette.targets.coreai.constants import tensor_type


def rms_norm(x: Value, weight: Value, eps: float) -> Value:
    """Root mean square normalisation over the last axis, called as the library's own is.

    Shapes: `[..., D]` and `[D]` to `[..., D]`.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    attributes = {"eps": eps, "axes": -1, "version": 1}
    declared = generate_composite_decl(
        x.context, "rms_norm", ["input", "scale"], ["output"], attributes
    )

    @core.graph(private=True, no_inline=True, composite_decl=declared)
    def rms_norm(value: Value, scale: Value) -> Value:
        last = [len(tensor_type(value).shape) - 1]
        mean = core.reduce_mean(core.broadcasting_mul(value, value), last)
        inverse = core.rsqrt(core.broadcasting_add(mean, core.constant(eps)))
        return core.broadcasting_mul(core.broadcasting_mul(value, inverse), scale)

    found: Value = rms_norm(x, weight)[0]
    return found
