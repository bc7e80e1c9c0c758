"""Steps of a module, and the places where neighbouring matrices may trade factors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lorgnette.export.component import VisionEncoder
from lorgnette.export.layers.decoder import DecoderLayer, LlamaDecoder
from lorgnette.export.layers.rope import rope_tables
from lorgnette.export.layers.stages import HasSites, Site, Stage
from lorgnette.export.layers.vision import VisionLayer
from lorgnette.spec import TextSpec
from tests.eager import Eager, random_tiles
from tests.zoo.checkpoint import CHECKPOINTS
from tests.zoo.families import FAMILIES

CHANGED = 1e-3
"""Relative difference that is no matter of rounding."""
EXACT = 1e-5


@pytest.fixture(scope="module", params=[family.name for family in FAMILIES.values()])
def eager(request: pytest.FixtureRequest) -> Eager:
    """Each family's model of the zoo."""
    torch.set_num_threads(1)
    return Eager(CHECKPOINTS / request.param)


def encoder_of(eager: Eager) -> VisionEncoder:
    found = eager.modules["vision_encoder"]
    assert isinstance(found, VisionEncoder)
    return found


def decoder_of(eager: Eager) -> LlamaDecoder:
    found = eager.modules["decoder"]
    assert isinstance(found, LlamaDecoder)
    return found


def run(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer of either kind; decoders get an empty cache."""
    if not isinstance(layer, DecoderLayer):
        return layer(x)  # type: ignore[no-any-return]
    attention = layer.attention
    size = attention.o_proj.in_features // attention.heads
    cache = torch.zeros(1, attention.kv_heads, x.shape[1], size)
    cos, sin = rope_tables(x.shape[1], size, 1e4)
    out, *_ = layer(x, cache, cache, cos, sin, torch.zeros(1, dtype=torch.int32))
    return out  # type: ignore[no-any-return]


def trade(layer: nn.Module, site: Site, factors: NDArray[np.float32]) -> None:
    """Divides channels and multiplies columns one by one."""
    held = dict(layer.named_parameters())
    for name, first in site.divided:
        for channel, factor in enumerate(factors):
            held[name][first + channel] /= factor
    for name in site.consumers:
        assert held[name].shape[1] == len(site.channel_of_column)
        for column, channel in enumerate(site.channel_of_column):
            held[name][:, column] *= factors[channel]


@torch.no_grad()
def change(layer: nn.Module, site: Site, x: Tensor, *, wrong: Site | None = None) -> float:
    """How much a trade changes what a layer gives, relative to the largest that it does."""
    before = {name: value.clone() for name, value in layer.named_parameters()}
    wanted = run(layer, x)
    factors = np.exp2(np.random.default_rng(3).uniform(-3, 3, site.channels)).astype(np.float32)
    trade(layer, wrong or site, factors)
    got = run(layer, x)
    for name, value in layer.named_parameters():
        value.copy_(before[name])
    return float((got - wanted).abs().max() / wanted.abs().max())


def layers_of(eager: Eager) -> list[nn.Module]:
    """One layer with sites of each component."""
    both = (encoder_of(eager), decoder_of(eager))
    return [next(s.module for s in each.stages() if s.sites) for each in both]


def noise(layer: nn.Module) -> Tensor:
    """Positions of its width."""
    width = next(m.in_features for m in layer.modules() if isinstance(m, nn.Linear))
    return torch.randn(1, 12, width, generator=torch.Generator().manual_seed(1))


def test_factors_traded_across_any_site_change_nothing(eager: Eager) -> None:
    for layer in layers_of(eager):
        assert isinstance(layer, HasSites)
        for site in layer.sites():
            assert change(layer, site, noise(layer)) < EXACT, site.name


def test_a_site_whose_columns_are_taken_for_their_neighbours_is_noticed(eager: Eager) -> None:
    for layer in layers_of(eager):
        assert isinstance(layer, HasSites)
        for site in layer.sites():
            shifted = np.roll(site.channel_of_column, 1)
            wrong = Site(site.name, site.divided, site.consumers, shifted)
            assert change(layer, site, noise(layer), wrong=wrong) > CHANGED, site.name


def test_every_matrix_that_reads_a_linear_map_is_a_consumer(eager: Eager) -> None:
    vision, text = layers_of(eager)
    assert isinstance(vision, VisionLayer)
    assert isinstance(text, DecoderLayer)
    qkv = {f"attention.{name}_proj.weight" for name in "qkv"}
    consumers = {name for site in vision.sites() for name in site.consumers}
    assert consumers == {*qkv, "attention.out_proj.weight", "mlp.fc1.weight"}
    consumers = {name for site in text.sites() for name in site.consumers}
    linear = {f"{n}.weight" for n, m in text.named_modules() if isinstance(m, nn.Linear)}
    assert consumers == linear
    assert len(linear) == 4


def small_layer(heads: int, kv_heads: int, bias: bool) -> DecoderLayer:
    """A decoder layer with random weights, gains and biases."""
    torch.manual_seed(heads)
    layer = DecoderLayer(
        TextSpec(
            hidden_size=48,
            intermediate_size=40,
            layers=1,
            heads=heads,
            kv_heads=kv_heads,
            head_size=8,
            vocab_size=16,
            max_positions=32,
            rope_theta=1e4,
            norm_eps=1e-5,
            tied_embeddings=False,
            qkv_bias=bias,
        )
    ).requires_grad_(False)
    for value in layer.parameters():
        value.copy_(torch.randn_like(value) / value.shape[-1] ** 0.5 + (value.ndim == 1))
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 3), (6, 2), (4, 1)])
def test_query_heads_that_share_values_share_factors(heads: int, kv_heads: int, bias: bool) -> None:
    layer = small_layer(heads, kv_heads, bias)
    x = torch.randn(1, 9, 48)
    for site in layer.sites():
        assert change(layer, site, x) < EXACT, site.name
    values = next(site for site in layer.sites() if site.name == "values")
    assert values.channels == kv_heads * 8
    assert len(values.divided) == 1 + bias
    if bias:
        without = Site("values", values.divided[:1], values.consumers, values.channel_of_column)
        assert change(layer, values, x, wrong=without) > CHANGED
    if 1 < kv_heads < heads:
        # Heads counted round robin instead of in blocks.
        heads_read = np.arange(heads) % kv_heads
        columns = (heads_read[:, None] * 8 + np.arange(8)).reshape(-1)
        wrong = Site("values", values.divided, values.consumers, columns)
        assert change(layer, values, x, wrong=wrong) > CHANGED


# Stages


def names_of(stages: list[Stage]) -> list[str]:
    return [stage.prefix + name for stage in stages for name in stage.module.state_dict()]


@torch.no_grad()
def test_stages_one_by_one_are_the_vision_encoder(eager: Eager) -> None:
    encoder = encoder_of(eager)
    tiles = random_tiles(2, eager.spec.vision.image_size)
    x = torch.from_numpy(tiles)
    for stage in encoder.stages():
        x = stage.module(x)
    assert torch.equal(x, encoder(torch.from_numpy(tiles)))
    assert sorted(names_of(encoder.stages())) == sorted(encoder.state_dict())


@torch.no_grad()
def test_stages_one_by_one_are_the_decoder(eager: Eager) -> None:
    decoder = decoder_of(eager)
    x = eager.embed([1, 7, 30, 8, 9])
    wanted, cache = eager.decode(x, 0, eager.empty_cache())
    *layers, norm, head = decoder.stages()
    for number, stage in enumerate(layers):
        assert isinstance(stage.module, DecoderLayer)
        empty = torch.zeros(decoder.cache_shape(5))
        start = torch.zeros(1, dtype=torch.int32)
        x, keys, _ = stage.module(x, empty, empty, decoder.cos, decoder.sin, start)
        other = cache[2 * number][:, :, :5]
        assert (keys - other).abs().max() <= EXACT * other.abs().max()
    got = head.module(norm.module(x))[0, -1]
    assert (got - wanted).abs().max() <= EXACT * wanted.abs().max()
    assert sorted(names_of(decoder.stages())) == sorted({*decoder.state_dict()} - {"cos", "sin"})


def test_modules_without_sites_have_none() -> None:
    assert Stage("x.", nn.Linear(2, 2)).sites == ()
