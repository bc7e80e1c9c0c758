"""Calibration: the original runs on pictures, layer by layer, and each layer is rounded in turn.

A layer sees what the rounded layers before it give, so that later ones can make up for them. One
layer's weights are in memory at a time, and the hidden states of all samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lorgnette.errors import ConfigError
from lorgnette.export.layers.stages import Site, Stage
from lorgnette.export.reference import load_stage
from lorgnette.export.trace import build_module
from lorgnette.quantize.activations import input_range, round_inputs
from lorgnette.quantize.cache import CacheRanges
from lorgnette.quantize.collect import Collector, rescaled
from lorgnette.quantize.inputs import LayerInputs
from lorgnette.quantize.methods import load_method
from lorgnette.quantize.plan import QuantPlan, Rule
from lorgnette.quantize.scaling import load_scaling
from lorgnette.quantize.scaling.site import SiteWeights
from lorgnette.quantize.store import QuantizedModel, QuantizedSource

if TYPE_CHECKING:
    from lorgnette.export.component import Component, VisionEncoder
    from lorgnette.export.layers.decoder import LlamaDecoder
    from lorgnette.export.prepared import PreparedSample
    from lorgnette.targets.capabilities import Matrix

Array = NDArray[np.float32]
TOGETHER = 1 << 20
"""Pixels of the tiles that are run together: small ones cost more to call than to compute."""
Run = Callable[[nn.Module, Tensor], Tensor]


@torch.no_grad()
def calibrate(
    components: Sequence[Component],
    model: QuantizedModel,
    samples: Sequence[PreparedSample],
    progress: Callable[[str], None],
) -> None:
    """Chooses the codes of every matrix whose rule looks at inputs, and rescales around them.

    Args:
        components: The components of the model.
        model: Takes the codes and what was rescaled.
        samples: What to run.
        progress: Told about each component.

    Raises:
        ConfigError: There are no samples.
    """
    if not samples:
        raise ConfigError("there is nothing to calibrate with", wanted="at least one sample")
    by_name = {component.name: component for component in components}
    progress("calibrate vision_encoder")
    image_tokens = _walk_vision(by_name["vision_encoder"], model, samples)
    progress("calibrate decoder")
    _walk_decoder(by_name["decoder"], model, samples, image_tokens)


def check_methods(plan: QuantPlan, matrices: Iterable[Matrix]) -> None:
    """Refuses methods that need the inputs of a matrix which is not multiplied with any.

    Raises:
        ConfigError: Naming the matrix.
    """
    for matrix in matrices:
        rule = plan.rule_for(matrix.component, matrix.name)
        if matrix.gathered and rule.scheme.is_integer and load_method(rule.method).NEEDS_INPUTS:
            raise ConfigError(
                f"the method '{rule.method}' looks at what a matrix is multiplied with",
                where=f"plan '{plan.name}'",
                got=f"'{matrix}', whose rows are looked up",
                hint=f"put a rule with another method, such as 'mse', before {rule.select!r}",
            )


def _walk_vision(
    component: Component, model: QuantizedModel, samples: Sequence[PreparedSample]
) -> list[Tensor]:
    """Image tokens `[G * N, D]` of each sample, as the rounded encoder gives them."""
    encoder = cast("VisionEncoder", build_module(component))
    source = model.sources[component.name]
    tiles = torch.from_numpy(np.concatenate([sample.tiles for sample in samples]))
    states = list(torch.split(tiles, max(1, TOGETHER // tiles[0].numel())))
    for stage in encoder.stages():
        states = _walk_stage(stage, source, states, lambda module, x: cast("Tensor", module(x)))
    counts = [len(sample.tiles) for sample in samples]
    return [tokens.flatten(0, 1) for tokens in torch.split(torch.cat(states), counts)]


def _walk_decoder(
    component: Component,
    model: QuantizedModel,
    samples: Sequence[PreparedSample],
    image_tokens: Sequence[Tensor],
) -> None:
    decoder = cast("LlamaDecoder", build_module(component))
    source = model.sources[component.name]
    embedding, name = model.sources["token_embedding"], "table.weight"
    # A table that takes the head's codes has none before the end of the walk.
    table = (
        torch.from_numpy(embedding.unrounded(name))
        if embedding.is_tied(name)
        else embedding.tensor(name)
    )
    states = []
    for sample, tokens in zip(samples, image_tokens, strict=True):
        embeddings = table[[*sample.prompt_ids, *sample.answer_ids]]
        embeddings[torch.from_numpy(sample.slots)] = tokens
        states.append(embeddings[None])
    del table
    cos, sin = source.tensor("cos"), source.tensor("sin")
    start = torch.zeros(1, dtype=torch.int32)

    caches = CacheRanges()

    def run(layer: nn.Module, x: Tensor) -> Tensor:
        cache = torch.zeros(*decoder.cache_shape(x.shape[1]))
        out, keys, values = layer(x, cache, cache, cos, sin, start)
        caches.add(keys, values)
        return cast("Tensor", out)

    *layers, norm, head = decoder.stages()
    for index, stage in enumerate(layers):
        states = _walk_stage(stage, source, states, run)
        if source.cache_bits == 8:
            caches.place(source, index)
        caches.clear()
    # Logits are asked for behind the prompt and each token of the answer.
    ends = [x[:, -len(sample.answer_ids) - 1 :] for x, sample in zip(states, samples, strict=True)]
    for stage in (norm, head):
        ends = _walk_stage(stage, source, ends, lambda module, x: cast("Tensor", module(x)))


def _walk_stage(
    stage: Stage, source: QuantizedSource, states: Sequence[Tensor], run: Run
) -> list[Tensor]:
    """Rounds a stage by what it sees, and gives what it makes of that then."""
    looked_at = [name for name in linears(stage) if looks_at(source, stage.prefix + name)]
    if looked_at:
        load_stage(stage, lambda name: torch.from_numpy(source.unrounded(name)))
        inputs = _collect(stage, states, run, looked_at, source)
        rescale_stage(stage, source, inputs)
        for name in looked_at:
            round_matrix(source, stage.prefix + name, inputs[name])
    load_stage(stage, source.tensor)
    after = [run(stage.module, x) for x in states]
    load_stage(stage, lambda name: torch.empty(source.shapes[name], device="meta"))
    return after


def linears(stage: Stage) -> list[str]:
    """Weights of the stage's linear layers, without its prefix."""
    return [
        f"{name}.weight" if name else "weight"
        for name, layer in stage.module.named_modules()
        if isinstance(layer, nn.Linear)
    ]


def looks_at(source: QuantizedSource, name: str) -> bool:
    """Whether calibration chooses the codes of a matrix."""
    return not source.is_tied(name) and source.rule(name).looks_at_inputs


def _collect(
    stage: Stage,
    states: Sequence[Tensor],
    run: Run,
    names: Sequence[str],
    source: QuantizedSource,
) -> dict[str, LayerInputs]:
    """Runs the stage as it was published and takes down what its matrices are multiplied with."""
    rules = [source.rule(stage.prefix + name) for name in names]
    # Palettes weigh columns by their mean squares.
    moments = any(load_method(r.method).NEEDS_INPUTS or r.scheme.palette for r in rules)
    with Collector(stage.module, names, moments=moments) as collector:
        for x in states:
            run(stage.module, x)
            collector.end_of_sample()
    return collector.inputs()


def rescale_stage(stage: Stage, source: QuantizedSource, inputs: dict[str, LayerInputs]) -> None:
    """Moves factors across every site whose consumers all ask for it; `inputs` follow."""
    for site in stage.sites:
        rules = [source.rule(stage.prefix + name) for name in site.consumers]
        scalings = {rule.scaling for rule in rules}
        if len(scalings) != 1 or scalings == {"none"} or not inputs.keys() >= set(site.consumers):
            continue
        seen = inputs[site.consumers[0]]
        weights = tuple(source.unrounded(stage.prefix + name) for name in site.consumers)
        scheme = rules[0].scheme
        method = load_scaling(rules[0].scaling)
        factors = method.factors(
            SiteWeights(
                consumers=weights,
                channel_of_column=site.channel_of_column,
                inputs=seen,
                round=partial(_plain, rules),
                round_inputs=partial(round_inputs, scheme=scheme),
            )
        )
        _apply(stage.prefix, site, source, factors)
        by_column = factors[site.channel_of_column]
        for name in site.consumers:
            inputs[name] = rescaled(inputs[name], by_column)


def _plain(rules: Sequence[Rule], matrix: Array, which: int) -> Array:
    """A matrix rounded to the nearest codes of its scheme: what a search over factors tries."""
    return load_method("rtn").quantize(matrix, rules[which].scheme).dequantize()


def _apply(prefix: str, site: Site, source: QuantizedSource, factors: Array) -> None:
    for name, first in site.divided:
        value = source.unrounded(prefix + name).copy()
        rows = value[first : first + len(factors)]
        rows /= factors if value.ndim == 1 else factors[:, None]
        source.change(prefix + name, value)
    by_column = factors[site.channel_of_column]
    for name in site.consumers:
        source.change(prefix + name, source.unrounded(prefix + name) * by_column)


def round_matrix(source: QuantizedSource, name: str, inputs: LayerInputs) -> None:
    """Chooses the codes of a matrix."""
    rule = source.rule(name)
    made = load_method(rule.method).quantize(source.unrounded(name), rule.scheme, inputs)
    if rule.scheme.activations == "int8_static":
        made = replace(made, input_range=input_range(inputs))
    source.place(name, made)
