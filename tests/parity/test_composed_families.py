"""MobileVLM and OmniVLM, through the real weight maps, against their parts in transformers.

The projectors between those parts are independent ones; weights are random.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lorgnette.errors import CheckpointError
from tests import make_mobilevlm as mobilevlm
from tests import make_omnivlm as omnivlm
from tests.composed_oracle import (
    ComposedOracle,
    mobilevlm_oracle,
    omnivlm_oracle,
    read_json,
    read_weights,
)
from tests.eager import Eager, prompt_ids, random_tiles
from tests.helpers import Config, random_weights
from tests.make_mobilevlm import CLIP_L_336, TINY_CLIP, make_mobilevlm
from tests.make_omnivlm import make_gguf_pair, make_omnivlm

TOLERANCE = 1e-4
Pair = tuple[Eager, ComposedOracle]


@dataclass(frozen=True)
class Mobile:
    """A MobileVLM checkpoint to make and compare."""

    config: Config
    clip: Config
    dtype: mobilevlm.DtypeName = "float32"
    shards: int = 1
    form: mobilevlm.Form = "bin"
    apart: bool = False

    def pair(self, folder: Path) -> Pair:
        apart = folder / "clip" if self.apart else None
        made = make_mobilevlm(
            folder / "checkpoint",
            self.config,
            self.clip,
            dtype=self.dtype,
            shards=self.shards,
            form=self.form,
            tower_apart=apart,
        )
        weights = read_weights(made)
        if apart is not None:
            tower = read_weights(apart).items()
            weights |= {mobilevlm.TOWER + n: w for n, w in tower if n.startswith("vision_model.")}
        return Eager(made, context=256, vision=apart), mobilevlm_oracle(
            self.config, self.clip, weights
        )


@dataclass(frozen=True)
class Omni:
    """An OmniVLM checkpoint in the normal form."""

    config: Config
    dtype: omnivlm.DtypeName = "float32"

    def pair(self, folder: Path) -> Pair:
        made = make_omnivlm(folder, self.config, dtype=self.dtype)
        return Eager(made, context=256), omnivlm_oracle(self.config, read_weights(made))


CASES: dict[str, Mobile | Omni] = {
    "mobilevlm-v1": Mobile(mobilevlm.tiny_config("ldpnet"), TINY_CLIP),
    "mobilevlm-v2": Mobile(mobilevlm.tiny_config(), TINY_CLIP),
    "mobilevlm-shards-bfloat16": Mobile(
        mobilevlm.tiny_config(), TINY_CLIP, dtype="bfloat16", shards=3
    ),
    "mobilevlm-safetensors-float16": Mobile(
        mobilevlm.tiny_config("ldpnet"), TINY_CLIP, dtype="float16", form="safetensors"
    ),
    "mobilevlm-v1-tower-apart": Mobile(mobilevlm.tiny_config("ldpnet"), TINY_CLIP, apart=True),
    "mobilevlm-head-40": Mobile(
        mobilevlm.tiny_config(head_dim=40, num_key_value_heads=2, rope_theta=50.0), TINY_CLIP
    ),
    "mobilevlm-epsilons": Mobile(
        mobilevlm.tiny_config(rms_norm_eps=0.03), TINY_CLIP | {"layer_norm_eps": 0.1}
    ),
    "mobilevlm-deep-tower": Mobile(
        mobilevlm.tiny_config(), TINY_CLIP | {"num_hidden_layers": 6, "image_size": 52}
    ),
    "omnivlm": Omni(omnivlm.tiny_config()),
    "nano-vlm-instruct": Omni(omnivlm.tiny_config(1)),
    "omnivlm-groups-of-three": Omni(omnivlm.tiny_config(3)),
    "omnivlm-untied-bfloat16": Omni(
        omnivlm.tiny_config(tie_word_embeddings=False), dtype="bfloat16"
    ),
}


def worst(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max())


@pytest.fixture(scope="module", params=list(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return CASES[request.param].pair(tmp_path_factory.mktemp("checkpoint"))


def test_image_tokens(pair: Pair) -> None:
    eager, oracle = pair
    tiles = random_tiles(2, eager.spec.vision.image_size)
    wanted = oracle.encode(tiles)
    assert float(wanted.std()) > 0.3  # not a dead model
    assert wanted.shape[1] == eager.spec.image_tokens_per_tile
    scale = max(1.0, float(wanted.abs().max()))
    assert worst(eager.encode(tiles), wanted) <= TOLERANCE * scale


def test_logits_in_one_pass_and_in_chunks(pair: Pair) -> None:
    eager, oracle = pair
    ids = prompt_ids(eager, 2)
    tiles = random_tiles(2, eager.spec.vision.image_size)
    wanted = oracle.logits(ids, tiles)
    assert float(wanted.std()) > 0.3
    embeddings = eager.splice(ids, tiles)
    scale = max(1.0, float(wanted.abs().max()))
    for chunks in ([len(ids)], [7, 1, 1, len(ids) - 14, 5]):
        at = np.cumsum(chunks) - 1
        assert worst(eager.logits(embeddings, chunks), wanted[at]) <= TOLERANCE * scale, chunks


def test_greedy_ids(pair: Pair) -> None:
    eager, oracle = pair
    ids = prompt_ids(eager, 1)
    tiles = random_tiles(1, eager.spec.vision.image_size)
    wanted = oracle.greedy(ids, tiles, 48)
    assert len(set(wanted)) > 16  # not one word again and again
    assert eager.greedy(eager.splice(ids, tiles), 48) == wanted


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("group", [9, 1])
def test_a_gguf_pair_is_the_normal_form_with_its_weights_rounded(
    tmp_path: Path, kind: omnivlm.Quantisation, group: int
) -> None:
    config = omnivlm.tiny_config(group)
    decoder, _ = make_gguf_pair(tmp_path / "pair", config, kind=kind)
    eager = Eager(decoder, context=256)  # the vision tower lies beside it
    normal = Eager(make_omnivlm(tmp_path / "normal", config))
    assert eager.spec == normal.spec
    weights = {n: stored(n, torch.from_numpy(v), kind) for n, v in drawn(config)}
    oracle = omnivlm_oracle(config, weights)
    ids, tiles = prompt_ids(eager, 1), random_tiles(1, eager.spec.vision.image_size)
    embeddings, wanted = eager.splice(ids, tiles), oracle.logits(ids, tiles)[-1]
    assert worst(eager.logits(embeddings, [len(ids)])[0], wanted) <= 2 * TOLERANCE
    assert eager.greedy(embeddings, 24) == oracle.greedy(ids, tiles, 24)


def drawn(config: Config) -> list[tuple[str, np.ndarray]]:
    return list(random_weights(omnivlm.published_shapes(config), 0))


def stored(name: str, value: Tensor, kind: omnivlm.Quantisation) -> Tensor:
    """A tensor as the file of its kind holds it, by plain arithmetic."""
    of_tower = name.startswith((omnivlm.TOWER, omnivlm.PROJECTOR))
    if value.dim() == 1 or kind == "F32":
        return value
    if kind == "F16" or of_tower or value.shape[-1] % 32:
        return value.half().float()
    blocks = value.reshape(*value.shape[:-1], -1, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    ratio = blocks / torch.where(scale == 0, torch.ones(()), scale)
    codes = torch.floor(ratio.abs() + 0.5) * ratio.sign()  # halves away from zero, as C rounds
    return (codes * scale.half().float()).reshape(value.shape)


def test_position_of_the_class_token_and_of_patches_counts(tmp_path: Path) -> None:
    """A picture and its mirror image are told apart, and not by noise."""
    eager, oracle = Mobile(mobilevlm.tiny_config(), TINY_CLIP).pair(tmp_path)
    tiles = random_tiles(1, 48)
    mirrored = tiles[..., ::-1].copy()
    assert worst(oracle.encode(tiles), oracle.encode(mirrored)) > 1000 * TOLERANCE
    wanted = oracle.encode(mirrored)
    assert worst(eager.encode(mirrored), wanted) <= TOLERANCE * float(wanted.abs().max())


CLIP_CONFIGS: dict[str, Callable[[Config], Config]] = {
    "the vision model alone": lambda clip: clip,
    "a whole CLIP": lambda clip: {"model_type": "clip", "vision_config": clip, "text_config": {}},
}


@pytest.mark.parametrize("kind", CLIP_CONFIGS)
def test_a_clip_directory_takes_the_place_of_the_tower(tmp_path: Path, kind: str) -> None:
    """As the original v1 does, though its checkpoint has a tower."""
    config = mobilevlm.tiny_config("ldpnet")
    make_mobilevlm(tmp_path / "own", config)
    make_mobilevlm(tmp_path / "other", config, seed=7, tower_apart=tmp_path / "clip")
    clip = tmp_path / "clip"
    (clip / "config.json").write_text(json.dumps(CLIP_CONFIGS[kind](TINY_CLIP)))
    mixed, own = Eager(tmp_path / "own", vision=clip), Eager(tmp_path / "own")
    weights = read_weights(tmp_path / "own")
    weights = {n: w for n, w in weights.items() if not n.startswith(mobilevlm.TOWER)}
    tower = read_weights(clip).items()
    weights |= {mobilevlm.TOWER + n: w for n, w in tower if n.startswith("vision_model.")}
    tiles = random_tiles(1, 48)
    wanted = mobilevlm_oracle(config, TINY_CLIP, weights).encode(tiles)
    assert worst(mixed.encode(tiles), wanted) <= TOLERANCE * float(wanted.abs().max())
    assert worst(own.encode(tiles), wanted) > 100 * TOLERANCE


def test_a_tower_with_more_layers_than_its_config_is_refused(tmp_path: Path) -> None:
    make_mobilevlm(tmp_path, mobilevlm.tiny_config())
    config = read_json(tmp_path / "vision_tower" / "config.json") | {"num_hidden_layers": 2}
    (tmp_path / "vision_tower" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="more layers than its config says"):
        _ = Eager(tmp_path).spec


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileVLM_V2-1.7B", "MobileVLM-1.7B", "OmniVLM-968M"])
def test_published_shapes(tmp_path: Path, name: str) -> None:
    """32 greedy tokens of the published sizes, random weights, one model in memory at a time."""
    if name == "OmniVLM-968M":
        config = read_json(omnivlm.CONFIGS / f"{name}.json")
        folder = make_omnivlm(tmp_path, config, dtype="bfloat16")
        oracle = omnivlm_oracle(config, read_weights(folder))
    else:
        config = read_json(mobilevlm.CONFIGS / f"{name}.json")
        folder = make_mobilevlm(tmp_path, config, CLIP_L_336, dtype="bfloat16")
        oracle = mobilevlm_oracle(config, CLIP_L_336, read_weights(folder))
    eager = Eager(folder, context=512)
    ids, tiles = prompt_ids(eager, 1), random_tiles(1, eager.spec.vision.image_size)
    tokens, logits = oracle.encode(tiles), oracle.logits(ids, tiles)[-1]
    greedy = oracle.greedy(ids, tiles, 32)
    del oracle
    gc.collect()
    assert worst(eager.encode(tiles), tokens) <= TOLERANCE * float(tokens.abs().max())
    embeddings = eager.splice(ids, tiles)
    got = eager.logits(embeddings, [len(ids)])[0]
    assert worst(got, logits) <= TOLERANCE * float(logits.abs().max())
    assert eager.greedy(embeddings, 32) == greedy
