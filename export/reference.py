"""The eager model in float32: what every bundle must agree with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from lorgnette.errors import ConfigError
from lorgnette.export.cache_rounding import round_cache
from lorgnette.export.component import Component
from lorgnette.export.layers.decoder import DecoderLayer, LlamaDecoder
from lorgnette.export.trace import build_module
from lorgnette.export.weights import ParameterSource, load_module
from lorgnette.quantize.scheme import InputRange
from lorgnette.quantize.store import QuantizedSource

RESIDENT_BYTES = 3 * 2**30
"""Components larger than this in float32 are read layer by layer instead of held."""

Float = NDArray[np.float32]
CACHED = ("key", "value")
Hook = Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]


class Reference:
    """Runs the components eagerly, on weights as published or as they are rounded.

    Args:
        components: The components of the model, by name.
        sources: Their weights, by name.
    """

    def __init__(
        self, components: Mapping[str, Component], sources: Mapping[str, ParameterSource]
    ) -> None:
        """Prepares the modules; large ones stay on the meta device until they run."""
        self._components = components
        self._sources = sources
        self._modules: dict[str, nn.Module] = {}

    @torch.no_grad()
    def encode(self, tiles: NDArray[np.uint8]) -> Float:
        """Image tokens, one tile at a time. Shapes: `[G, 3, edge, edge]` to `[G, N, D]`."""
        encoder = self._module("vision_encoder")
        return np.concatenate([encoder(torch.from_numpy(tile[None])).numpy() for tile in tiles])

    @torch.no_grad()
    def embed(self, token_ids: Sequence[int]) -> Float:
        """Embeddings `[T, D]` of tokens."""
        embedded: Tensor = self._module("token_embedding")(torch.tensor([list(token_ids)]))
        return embedded[0].numpy()

    @torch.no_grad()
    def generate(
        self, embeddings: Float, count: int, stop_ids: Sequence[int]
    ) -> tuple[Float, list[int]]:
        """The greedy tokens that follow a prompt, and the logits that each was chosen from.

        Args:
            embeddings: The prompt `[T, D]`, image tokens spliced in.
            count: How many tokens at most.
            stop_ids: Tokens that end the answer.

        Returns:
            Logits `[K, V]` and the K token ids.
        """
        caches = self._empty_caches(len(embeddings) + count)
        decoder = self._module("decoder")
        fed, past = torch.from_numpy(embeddings[None]), 0
        rows: list[Float] = []
        ids: list[int] = []
        while True:
            logits, caches = decoder(fed, torch.tensor([past], dtype=torch.int32), caches)
            past += fed.shape[1]
            ids.append(int(logits[0].argmax()))
            rows.append(logits[0].numpy())
            if len(ids) == count or ids[-1] in stop_ids:
                return np.stack(rows), ids
            fed = torch.from_numpy(self.embed(ids[-1:])[None])

    @torch.no_grad()
    def follow(self, embeddings: Float, token_ids: Sequence[int]) -> Float:
        """The logits that each of some given tokens would have been chosen from.

        One pass over all positions: where weights are read as they are needed, they are read once.

        Args:
            embeddings: The prompt `[T, D]`, image tokens spliced in.
            token_ids: The K tokens behind it.

        Returns:
            Logits `[K, V]`.
        """
        if len(token_ids) > 1:
            embeddings = np.concatenate([embeddings, self.embed(token_ids[:-1])])
        decoder = cast("LlamaDecoder", self._module("decoder"))
        hidden: list[Tensor] = []

        def keep(_: nn.Module, __: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
            hidden.append(output[0])

        hook = decoder.layers[-1].register_forward_hook(keep)
        fed = torch.from_numpy(embeddings[None])
        decoder(fed, torch.zeros(1, dtype=torch.int32), self._empty_caches(len(embeddings)))
        hook.remove()
        last: Tensor = decoder.head(decoder.norm(hidden[0][0, -len(token_ids) :]))
        return last.numpy()

    def _empty_caches(self, capacity: int) -> list[Tensor]:
        return [
            torch.zeros([capacity if axis == "S" else int(axis) for axis in spec.shape])
            for spec in self._components["decoder"].cache_inputs
        ]

    def round_activations(self) -> set[str]:
        """Makes every component round the inputs of its matrices from now on as the plan says.

        A KV cache of 8 bits rounds keys and values as well.

        To 8 bits: symmetric for each position, or as onnxruntime's MatMulNBits does at accuracy
        level 4 for each position and group of the weight; or with one scale and zero point for all.

        Returns:
            The components that have any such matrix, or cache.

        Raises:
            ConfigError: The range of static activations is not known.
        """
        rounded: set[str] = set()
        for component, source in self._sources.items():
            if not isinstance(source, QuantizedSource):
                continue
            for name, layer in self._module(component).named_modules():
                if not isinstance(layer, nn.Linear):
                    continue
                scheme = source.rule(f"{name}.weight").scheme
                if scheme.activations == "float":
                    continue
                if scheme.activations == "int8_static":
                    found = source.codes(f"{name}.weight").input_range
                    if found is None:
                        raise ConfigError(
                            "no range is known of inputs", where=f"{component}/{name}.weight"
                        )
                    layer.register_forward_pre_hook(_static_rounding(found))
                else:
                    by_group = scheme.activations == "int8_group"
                    width = scheme.group_size if by_group else layer.in_features
                    layer.register_forward_pre_hook(_rounding(width))
                rounded.add(component)
            if source.cache_bits == 8 and self._components[component].cache_inputs:
                self._round_cache(component, source)
                rounded.add(component)
        return rounded

    def _round_cache(self, component: str, source: QuantizedSource) -> None:
        decoder = cast("LlamaDecoder", self._module(component))
        for index, layer in enumerate(decoder.layers):
            scales = [torch.from_numpy(source.cache_scale(f"{n}_{index}")) for n in CACHED]
            round_cache(cast("DecoderLayer", layer).attention, *scales)

    def _module(self, name: str) -> nn.Module:
        if name not in self._modules:
            module = build_module(self._components[name])
            source = self._sources[name]
            size = 4 * sum(math.prod(shape) for shape in source.shapes.values())
            if size <= RESIDENT_BYTES:
                load_module(module, source)
            else:
                stream_module(module, source)
            self._modules[name] = module
        return self._modules[name]


def _static_rounding(how: InputRange) -> Hook:
    """A hook that rounds a layer's input to 8 bits, one scale and zero point for all of it."""

    def hook(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        scale = torch.tensor(how.scale)
        codes = ((inputs[0] / scale).round() + how.zero_point).clamp(0, 255)
        return ((codes - how.zero_point) * scale,)

    return hook


def _rounding(width: int) -> Hook:
    """A hook that rounds a layer's input to 8 bits, a scale for each `width` of its last axis."""

    def hook(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        columns = inputs[0].shape[-1]
        padded = functional.pad(inputs[0], (0, -columns % width))
        grouped = padded.reshape(*padded.shape[:-1], -1, width)
        scale = grouped.abs().amax(-1, keepdim=True) / 127
        rounded = torch.where(scale > 0, (grouped / scale).round() * scale, grouped)
        return (rounded.flatten(-2)[..., :columns],)

    return hook


def stream_module(module: nn.Module, source: ParameterSource) -> None:
    """Makes every layer of a meta module read its weights when it runs and drop them after."""

    def attach(layer: nn.Module, prefix: str) -> None:
        held = {**layer._parameters, **layer._buffers}
        names = [name for name, value in held.items() if value is not None]

        def load(target: nn.Module, _: object) -> None:
            for name in names:
                set_parameter(target, name, source.tensor(prefix + name))

        def drop(target: nn.Module, _: object, __: object) -> None:
            for name in names:
                set_parameter(
                    target, name, torch.empty(source.shapes[prefix + name], device="meta")
                )

        layer.register_forward_pre_hook(load)
        layer.register_forward_hook(drop)

    for path, layer in module.named_modules():
        if layer._parameters or layer._buffers:
            attach(layer, f"{path}." if path else "")


def set_parameter(layer: nn.Module, name: str, value: Tensor) -> None:
    """Puts a tensor in the place of a parameter or buffer."""
    if name in layer._parameters:
        layer._parameters[name] = nn.Parameter(value, requires_grad=False)
    else:
        layer._buffers[name] = value
