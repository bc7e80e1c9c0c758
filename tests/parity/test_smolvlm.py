"""Our modules against transformers, through the real weight map, at random weights."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from tests.eager import CONTEXT, Eager, prompt_ids, random_tiles
from tests.helpers import (
    CONFIGS,
    Config,
    make_checkpoint,
    make_random_published,
    tiny_config,
    write_weights,
)

TILES = 3
TOLERANCE = 1e-4

CASES: dict[str, tuple[Config, dict[str, Any]]] = {
    "smolvlm-gqa": (tiny_config(), {}),
    "idefics3-gqa": (tiny_config("idefics3"), {}),
    "mha": (tiny_config(text={"num_key_value_heads": 4}), {}),
    "mqa-wide-heads": (tiny_config(text={"num_key_value_heads": 1, "head_dim": 24}), {}),
    "scale-3-border": (
        # 6 patches of 7 pixels leave 2 pixels on each side that no patch covers.
        tiny_config("idefics3", vision={"image_size": 44, "patch_size": 7}, scale_factor=3),
        {},
    ),
    "patch-over-half": (
        tiny_config(vision={"image_size": 22, "patch_size": 6}, scale_factor=3),
        {},
    ),
    "scale-4": (tiny_config(vision={"image_size": 64}, scale_factor=4), {}),
    "tied": (tiny_config(), {"tied": True}),
    "bfloat16": (tiny_config(), {"dtype": "bfloat16"}),
    "float16-shards": (tiny_config("idefics3"), {"dtype": "float16", "shards": 2}),
    "epsilons-theta": (
        tiny_config(
            text={"rms_norm_eps": 0.03, "rope_theta": 50.0}, vision={"layer_norm_eps": 0.1}
        ),
        {},
    ),
}


class Oracle:
    """The transformers model of a checkpoint, in float32 with eager attention."""

    def __init__(self, folder: Path) -> None:
        kind = json.loads((folder / "config.json").read_text())["model_type"]
        name = {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}[kind]
        self.model, report = getattr(
            transformers, f"{name}ForConditionalGeneration"
        ).from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(report.values()), report
        self.model.eval()

    def pixels(self, tiles: NDArray[np.uint8]) -> dict[str, Tensor]:
        values = torch.from_numpy((tiles.astype(np.float32) / 255 - 0.5) / 0.5)
        mask = torch.ones(tiles.shape[:1] + tiles.shape[2:], dtype=torch.bool)
        return {"pixel_values": values[None], "pixel_attention_mask": mask[None]}

    @torch.no_grad()
    def encode(self, tiles: NDArray[np.uint8]) -> Tensor:
        (tokens,) = self.model.model.get_image_features(**self.pixels(tiles)).pooler_output
        return tokens.reshape(len(tiles), -1, tokens.shape[-1])  # type: ignore[no-any-return]

    @torch.no_grad()
    def logits(self, ids: list[int], tiles: NDArray[np.uint8] | None = None) -> Tensor:
        extra = {} if tiles is None else self.pixels(tiles)
        return self.model(input_ids=torch.tensor([ids]), **extra).logits[0]  # type: ignore[no-any-return]

    @torch.no_grad()
    def greedy(self, ids: list[int], tiles: NDArray[np.uint8], steps: int) -> list[int]:
        out = self.model(input_ids=torch.tensor([ids]), use_cache=True, **self.pixels(tiles))
        found = [int(out.logits[0, -1].argmax())]
        while len(found) < steps:
            out = self.model(
                input_ids=torch.tensor([found[-1:]]),
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            found.append(int(out.logits[0, -1].argmax()))
        return found


@pytest.fixture(scope="module", params=list(CASES))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Eager, Oracle]:
    config, options = CASES[request.param]
    folder = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), config, **options)
    return Eager(folder), Oracle(folder)


def worst(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max())


def test_image_tokens(pair: tuple[Eager, Oracle]) -> None:
    eager, oracle = pair
    tiles = random_tiles(TILES, eager.spec.vision.image_size)
    wanted = oracle.encode(tiles)
    assert float(wanted.std()) > 0.3  # not a dead model
    assert worst(eager.encode(tiles), wanted) <= TOLERANCE


def test_logits_of_text(pair: tuple[Eager, Oracle]) -> None:
    eager, oracle = pair
    ids = [i for i in prompt_ids(eager, 0) if i != eager.spec.image_token_id]
    wanted = oracle.logits(ids)
    assert float(wanted.std()) > 0.3
    got = eager.logits(eager.embed(ids), [1] * len(ids))
    assert worst(got, wanted) <= TOLERANCE


def test_logits_of_pictures_in_one_pass_and_in_chunks(pair: tuple[Eager, Oracle]) -> None:
    eager, oracle = pair
    ids = prompt_ids(eager, TILES)
    tiles = random_tiles(TILES, eager.spec.vision.image_size)
    wanted = oracle.logits(ids, tiles)
    embeddings = eager.splice(ids, tiles)
    for chunks in ([len(ids)], [7, 1, 1, len(ids) - 14, 5], [1, len(ids) - 1]):
        at = np.cumsum(chunks) - 1
        assert worst(eager.logits(embeddings, chunks), wanted[at]) <= TOLERANCE, chunks


def test_greedy_ids(pair: tuple[Eager, Oracle]) -> None:
    eager, oracle = pair
    ids = prompt_ids(eager, TILES)
    tiles = random_tiles(TILES, eager.spec.vision.image_size)
    assert len(ids) + 64 <= CONTEXT
    wanted = oracle.greedy(ids, tiles, 64)
    assert len(set(wanted)) > 16  # not one word again and again
    assert eager.greedy(eager.splice(ids, tiles), 64) == wanted


def test_order_of_tiles_counts(pair: tuple[Eager, Oracle]) -> None:
    eager, oracle = pair
    ids = prompt_ids(eager, 2)
    tiles = random_tiles(2, eager.spec.vision.image_size)
    forward, backward = (oracle.logits(ids, t)[-1] for t in (tiles, tiles[::-1].copy()))
    assert worst(forward, backward) > 100 * TOLERANCE
    got = eager.logits(eager.splice(ids, tiles[::-1].copy()), [len(ids)])[0]
    assert worst(got, backward) <= TOLERANCE


@pytest.mark.parametrize("own", [True, False])
def test_tied_config_with_a_stored_head(tmp_path: Path, own: bool) -> None:
    """A head that is stored and differs counts, whatever the config says; an equal one is tied."""
    make_checkpoint(tmp_path, tiny_config(), tied=True)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    embedding = weights["model.text_model.embed_tokens.weight"]
    weights["lm_head.weight"] = embedding.flip(0) if own else embedding.clone()
    write_weights(tmp_path, weights)
    eager, oracle = Eager(tmp_path), Oracle(tmp_path)
    assert eager.spec.text.tied_embeddings is not own
    ids = prompt_ids(eager, 0)
    wanted = oracle.logits(ids)[-1]
    assert worst(eager.logits(eager.embed(ids), [len(ids)])[0], wanted) <= TOLERANCE


@pytest.mark.slow
def test_published_256m(tmp_path: Path) -> None:
    make_random_published(tmp_path, CONFIGS / "SmolVLM-256M-Instruct.json")
    eager, tiles = Eager(tmp_path, context=256), random_tiles(2, 512)
    ids = prompt_ids(eager, 2)
    oracle = Oracle(tmp_path)
    tokens, logits, greedy = (
        oracle.encode(tiles),
        oracle.logits(ids, tiles)[[99, -1]],
        oracle.greedy(ids, tiles, 16),
    )
    del oracle  # one model in memory at a time
    gc.collect()
    # Relative here: over 30 layers float32 rounding of another order of sums adds up.
    assert worst(eager.encode(tiles), tokens) <= TOLERANCE * float(tokens.abs().max())
    embeddings = eager.splice(ids, tiles)
    got = eager.logits(embeddings, [100, len(ids) - 100])
    assert worst(got, logits) <= TOLERANCE * float(logits.abs().max())
    assert eager.greedy(embeddings, 16) == greedy
