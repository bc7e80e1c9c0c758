"""The eager model in float32: what every bundle must agree with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from lorgnette.errors import ConfigError
from lorgnette.export.cache_rounding import round_cache
from lorgnette.export.component import Component
from lorgnette.export.layers.decoder import DecoderLayer, LlamaDecoder
from lorgnette.export.layers.stages import Stage
from lorgnette.export.trace import build_module
from lorgnette.export.weights import ParameterSource, load_module
from lorgnette.quantize.plan import QuantPlan
from lorgnette.quantize.scheme import InputRange
from lorgnette.quantize.store import QuantizedSource

RESIDENT_BYTES = 3 * 2**30
"""Components larger than this in float32 are read layer by layer instead of held."""

Float = NDArray[np.float32]
CACHED = ("key", "value")
Hook = Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]


@dataclass
class _Answer:
    """An answer that is being given: what goes in next, and what came out so far."""

    fed: Tensor
    caches: list[Tensor]
    past: int = 0
    rows: list[Float] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)


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
        self._rounding: list[RemovableHandle] = []

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
        return self.generate_all([embeddings], count, stop_ids)[0]

    @torch.no_grad()
    def generate_all(
        self, prompts: Sequence[Float], count: int, stop_ids: Sequence[int]
    ) -> list[tuple[Float, list[int]]]:
        """The same for several prompts, token by token together.

        Where weights are read as they are needed, they are read once a token, not once a token and
        prompt.

        Args:
            prompts: Each `[T, D]`, image tokens spliced in.
            count: How many tokens at most, each.
            stop_ids: Tokens that end an answer.

        Returns:
            Logits `[K, V]` and the K token ids of each.
        """
        answers: list[_Answer] = []
        decoder = cast("LlamaDecoder", self._module("decoder"))
        for embeddings in prompts:
            caches = self._empty_caches(len(embeddings) + count)
            answers.append(_Answer(torch.from_numpy(embeddings[None]), caches))
        going = answers
        while going:
            self._step(decoder, going)
            for answer in going:
                answer.fed = torch.from_numpy(self.embed(answer.ids[-1:])[None])
            going = [a for a in going if len(a.ids) < count and a.ids[-1] not in stop_ids]
        return [(np.stack(answer.rows), answer.ids) for answer in answers]

    def _step(self, decoder: LlamaDecoder, answers: Sequence[_Answer]) -> None:
        """Takes what each answer is fed through the decoder, a layer of all answers at a time."""
        source = self._sources["decoder"]
        cos, sin = source.tensor("cos"), source.tensor("sin")
        *layers, norm, head = decoder.stages()
        hidden = [answer.fed for answer in answers]
        for index, stage in enumerate(layers):
            keys, values = 2 * index, 2 * index + 1
            with _held(stage, source):
                for at, answer in enumerate(answers):
                    hidden[at], *answer.caches[keys : values + 1] = stage.module(
                        hidden[at],
                        *answer.caches[keys : values + 1],
                        cos,
                        sin,
                        torch.tensor([answer.past], dtype=torch.int32),
                    )
        with _held(norm, source), _held(head, source):
            for x, answer in zip(hidden, answers, strict=True):
                logits: Tensor = head.module(norm.module(x[:, -1]))
                answer.past += x.shape[1]
                answer.rows.append(logits[0].numpy())
                answer.ids.append(int(logits[0].argmax()))

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

    def round_activations(self, plan: QuantPlan | None = None) -> set[str]:
        """Makes every component round the inputs of its matrices from now on as the plan says.

        `plan` tells how a target treats activations where that is not what the weights' plan says.

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
                weight = f"{name}.weight"
                scheme = (plan.rule_for(component, weight) if plan else source.rule(weight)).scheme
                if scheme.activations == "float":
                    continue
                if scheme.activations == "int8_static":
                    found = source.codes(f"{name}.weight").input_range
                    if found is None:
                        raise ConfigError(
                            "no range is known of inputs", where=f"{component}/{name}.weight"
                        )
                    handle = layer.register_forward_pre_hook(_static_rounding(found))
                else:
                    by_group = scheme.activations == "int8_group"
                    width = scheme.group_size if by_group else layer.in_features
                    handle = layer.register_forward_pre_hook(_rounding(width))
                self._rounding.append(handle)
                rounded.add(component)
            if source.cache_bits == 8 and self._components[component].cache_inputs:
                self._round_cache(component, source)
                rounded.add(component)
        return rounded

    def compute_in_half(self) -> None:
        """Makes every module round what it gives to float16 from now on, as engines of that do.

        Inside a module, such as between the products of a matrix and their sum, nothing is.
        """
        for component in self._components:
            for module in self._module(component).modules():
                self._rounding.append(module.register_forward_hook(_halve))

    def stop_rounding(self) -> None:
        """Ends what `round_activations` and `compute_in_half` began, a cache of 8 bits aside."""
        for handle in self._rounding:
            handle.remove()
        self._rounding.clear()

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


def _halve(_: nn.Module, __: object, output: object) -> object:
    """A hook that rounds what a module gives to float16."""
    if isinstance(output, Tensor):
        return output.to(torch.float16).to(torch.float32) if output.is_floating_point() else output
    if isinstance(output, tuple | list):
        return type(output)(_halve(_, __, part) for part in output)
    return output


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

        read_here = False

        def load(target: nn.Module, _: object) -> None:
            nonlocal read_here
            read_here = any(value.is_meta for value in target.state_dict(keep_vars=True).values())
            for name in names if read_here else ():
                set_parameter(target, name, source.tensor(prefix + name))

        def drop(target: nn.Module, _: object, __: object) -> None:
            for name in names if read_here else ():
                set_parameter(
                    target, name, torch.empty(source.shapes[prefix + name], device="meta")
                )

        layer.register_forward_pre_hook(load)
        layer.register_forward_hook(drop)

    for path, layer in module.named_modules():
        if layer._parameters or layer._buffers:
            attach(layer, f"{path}." if path else "")


def load_stage(stage: Stage, read: Callable[[str], Tensor]) -> None:
    """Puts what `read` gives for each name in the place of a stage's parameters."""
    for path, layer in stage.module.named_modules():
        prefix = stage.prefix + (f"{path}." if path else "")
        held = {**layer._parameters, **layer._buffers}
        for name in [name for name, value in held.items() if value is not None]:
            set_parameter(layer, name, read(prefix + name))


@contextmanager
def _held(stage: Stage, source: ParameterSource) -> Iterator[None]:
    """Holds the weights of a stage that is read as it runs; others are held anyway."""
    if not any(value.is_meta for value in stage.module.state_dict().values()):
        yield
        return
    load_stage(stage, source.tensor)
    yield
    load_stage(stage, lambda name: torch.empty(source.shapes[name], device="meta"))


def set_parameter(layer: nn.Module, name: str, value: Tensor) -> None:
    """Puts a tensor in the place of a parameter or buffer."""
    if name in layer._parameters:
        layer._parameters[name] = nn.Parameter(value, requires_grad=False)
    else:
        layer._buffers[name] = value
