"""Rotating the decoder's residual stream, so that no channel of it holds outliers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import numpy as np
from torch import nn

from lorgnette.errors import ConfigError
from lorgnette.export.layers.projectors import ConcatProjector, PixelShuffleProjector
from lorgnette.export.trace import build_module
from lorgnette.quantize.rotation import hadamard, rotated
from lorgnette.quantize.store import QuantizedModel, QuantizedSource

if TYPE_CHECKING:
    from lorgnette.export.component import Component, VisionEncoder
    from lorgnette.export.layers.decoder import LlamaDecoder

LAST_LINEAR = {PixelShuffleProjector: "projection", ConcatProjector: "mlp.fc2"}
"""The matrix that a projector ends in, of those that end in one."""


def rotate_residual(components: Mapping[str, Component], model: QuantizedModel) -> None:
    """Rotates what embeddings and image tokens write and all layers read and write.

    With R orthonormal and g the gain of a norm, which is put into the matrices behind it,
    `norm(x R) (W diag(g) R)^T = norm(x) diag(g) W^T`, since a root mean square is the same in every
    basis. So the decoder computes what it did, and its residual stream, and with it the inputs of
    most matrices, is spread evenly. Nothing is left to do at run time.

    A table tied to the head becomes a matrix of its own, because the last gain is the head's alone.

    Raises:
        ConfigError: No Hadamard matrix of this width is known, or the projector does not end in a
            matrix, so that the rotation would have to be done at run time.

    Source: Ashkboos et al. 2024, "QuaRot", arXiv 2404.00456, section 4.1; Ashkboos et al. 2024,
        "SliceGPT", arXiv 2401.15024, theorem 1 (RMSNorm commutes with rotations).
    """
    decoder = cast("LlamaDecoder", build_module(components["decoder"]))
    projector = cast("VisionEncoder", build_module(components["vision_encoder"])).projector
    last = LAST_LINEAR.get(type(projector))
    if last is None:
        raise ConfigError(
            "a rotation does not fuse away",
            where="vision_encoder/projector",
            got=f"{type(projector).__name__}, which does not end in a matrix",
            hint="leave 'rotate' out of the plan for this model",
        )
    hadamard(decoder.head.in_features)  # refuses widths before anything is changed
    text = model.sources["decoder"]
    _rotate_reads(model.sources["token_embedding"], "table.weight", None)
    _rotate_writes(model.sources["vision_encoder"], f"projector.{last}", projector)
    for stage in decoder.stages()[:-2]:
        for site in stage.sites:
            (norm, _), *others = site.divided
            if norm.startswith("norm") and not others:
                for name in site.consumers:
                    _rotate_reads(text, stage.prefix + name, stage.prefix + norm)
                _level(text, stage.prefix + norm)
        for name in ("attention.o_proj", "mlp.down_proj"):
            _rotate_writes(text, stage.prefix + name, None)
    _rotate_reads(text, "head.weight", "norm.weight")
    _level(text, "norm.weight")


def _rotate_reads(source: QuantizedSource, name: str, norm: str | None) -> None:
    """A matrix whose columns are the stream's channels, the gain of the norm before it put in."""
    weight = source.unrounded(name)
    if norm is not None:
        weight = weight * source.unrounded(norm)
    source.change(name, rotated(weight))


def _rotate_writes(source: QuantizedSource, name: str, projector: nn.Module | None) -> None:
    """A matrix whose rows are the stream's channels, and its bias where it has one."""
    weight = source.unrounded(f"{name}.weight")
    source.change(f"{name}.weight", np.ascontiguousarray(rotated(weight.T).T))
    bias = f"{name}.bias"
    if projector is not None and bias in source.shapes:
        source.change(bias, rotated(source.unrounded(bias)[None])[0])


def _level(source: QuantizedSource, norm: str) -> None:
    source.change(norm, np.ones(source.shapes[norm], np.float32))
