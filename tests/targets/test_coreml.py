"""Whole models as Core ML packages, read back from disk and run: every family, every plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lorgnette.quantize.plan import PLANS
from lorgnette.targets.coreml.build import CHUNK, capacity_for
from tests.coreml import Array, Decoding, Packages, StoredEager, embed, encode, lower_all
from tests.eager import Eager, prompt_ids, random_tiles
from tests.helpers import make_checkpoint, tiny_config
from tests.make_mobilevlm import TINY_CLIP, make_mobilevlm
from tests.make_mobilevlm import tiny_config as mobilevlm_config
from tests.make_omnivlm import make_omnivlm
from tests.make_omnivlm import tiny_config as omnivlm_config

ODD = tiny_config(
    "idefics3",
    text={"num_key_value_heads": 4, "intermediate_size": 104},
    vision={"hidden_size": 72, "intermediate_size": 100, "patch_size": 7, "image_size": 44},
    scale_factor=3,
)
"""No width of the tower, no patch and no inner width fills its last group of 32."""

MODELS: dict[str, Callable[[Path], Path]] = {
    "smolvlm": lambda folder: make_checkpoint(folder, tiny_config()),
    "smolvlm-odd": lambda folder: make_checkpoint(folder, ODD),
    "mobilevlm": lambda folder: make_mobilevlm(folder, mobilevlm_config("ldpnet"), TINY_CLIP),
    "mobilevlm-v2": lambda folder: make_mobilevlm(folder, mobilevlm_config(), TINY_CLIP),
    "omnivlm": lambda folder: make_omnivlm(folder, omnivlm_config()),
}
PLAN_NAMES = ("fp32", "fp16", "int8", "int4-fast")
OFTEN = {
    ("smolvlm", "fp32"),
    ("smolvlm", "int4-fast"),
    ("smolvlm-odd", "int4-fast"),
    ("mobilevlm", "int8"),
    ("mobilevlm-v2", "fp16"),
    ("omnivlm", "int4-fast"),
}
"""What is tried by default; every other pair runs with the slow tests."""
PAIRS = [
    pytest.param((name, plan), marks=() if (name, plan) in OFTEN else pytest.mark.slow)
    for name in MODELS
    for plan in PLAN_NAMES
]
TIGHT = {"fp32": 2e-5}
HALF_TIGHT = 2e-4
"""Constants of a program are float16, too: a hard sigmoid's slope, 1 / 6, is off by as much."""
ROUNDED = 1e-2
"""What rounding every result to float16 may cost; it is about a tenth of that."""


class Model:
    """A tiny model under one plan: its packages, and the same weights in plain torch."""

    def __init__(self, plain: Eager, plan: str, folder: Path) -> None:
        self.plan = plan
        self.packages: Packages = lower_all(folder, plain, PLANS[plan])
        self.stored = StoredEager(plain.folder, PLANS[plan])
        self.eager = Eager(plain.folder, PLANS[plan])

    @property
    def tight(self) -> float:
        return TIGHT.get(self.plan, HALF_TIGHT)


@pytest.fixture(scope="module")
def checkpoints() -> dict[str, Eager]:
    """The models as published, made when they are first asked for."""
    return {}


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def model(
    request: pytest.FixtureRequest,
    checkpoints: dict[str, Eager],
    tmp_path_factory: pytest.TempPathFactory,
) -> Model:
    name, plan = request.param
    if name not in checkpoints:
        checkpoints[name] = Eager(MODELS[name](tmp_path_factory.mktemp("checkpoint")))
    return Model(checkpoints[name], plan, tmp_path_factory.mktemp("packages") / "out")


def off(got: Array, wanted: Array) -> float:
    """Norm of the difference over the norm of what was wanted."""
    assert got.shape == wanted.shape
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def tokens(eager: Eager) -> list[int]:
    """A prompt that takes more than one call of prefill."""
    draw = np.random.default_rng(3)
    return [int(i) for i in draw.integers(0, eager.spec.text.vocab_size, CHUNK + 20)]


def whole_pass(eager: Eager, embeddings: torch.Tensor) -> Array:
    """Logits behind a prompt that torch reads in one call."""
    return eager.logits(embeddings, [embeddings.shape[1]])[0].numpy()


def test_image_tokens(model: Model) -> None:
    tiles = random_tiles(2, model.eager.spec.vision.image_size)
    exact = encode(model.packages.exact["vision_encoder"], tiles)
    assert off(exact, model.stored.encode(tiles).numpy()) <= model.tight
    rounded = encode(model.packages.rounding["vision_encoder"], tiles)
    lost = off(rounded, model.stored.encode(tiles).numpy())
    assert lost <= (ROUNDED if model.plan != "fp32" else model.tight)
    if model.plan != "fp32":
        assert lost > 1e-5  # so it is rounded indeed
        assert off(exact, model.eager.encode(tiles).numpy()) <= 5e-3


def test_embeddings(model: Model) -> None:
    ids = [0, 3, model.eager.spec.text.vocab_size - 1, 7, 7]
    wanted = model.stored.embed(ids)[0].numpy()
    exact = embed(model.packages.exact["token_embedding"], ids)
    assert np.array_equal(exact, wanted)
    rounded = embed(model.packages.rounding["token_embedding"], ids)
    limit = 0 if model.plan in ("fp32", "fp16") else 2**-11
    assert np.all(np.abs(rounded - wanted) <= limit * np.abs(wanted) + 2**-24)
    one = model.packages.exact["token_embedding"].run("embed_one", {"token_ids": np.array([[3]])})
    assert np.array_equal(one["embeddings"][0, 0], wanted[1])


@pytest.mark.parametrize("chunks", [[CHUNK, 20], [5, 50, 26, 1, 1, 1], [1, 1, CHUNK, 18]])
def test_logits_however_a_prompt_is_cut(model: Model, chunks: list[int]) -> None:
    ids = tokens(model.eager)
    embeddings = model.stored.embed(ids)
    at = np.cumsum(chunks) - 1
    wanted = np.stack([whole_pass(model.stored, embeddings[:, : end + 1]) for end in at])
    exact = Decoding(model.packages.exact["decoder"]).logits(embeddings[0].numpy(), chunks)
    assert off(exact, wanted) <= model.tight
    rounding = Decoding(model.packages.rounding["decoder"]).logits(embeddings[0].numpy(), chunks)
    assert off(rounding, wanted) <= (ROUNDED if model.plan != "fp32" else model.tight)


def test_cutting_the_cache_back(model: Model) -> None:
    """Positions from the past on are overwritten, those before are kept."""
    embeddings = model.stored.embed(tokens(model.eager))[0].numpy()
    decoding = Decoding(model.packages.rounding["decoder"])
    decoding.logits(embeddings, [CHUNK, 20])
    again = decoding.run(embeddings[10:30], 10)
    fresh = Decoding(model.packages.rounding["decoder"]).logits(embeddings, [10, 20])[1]
    assert np.array_equal(again, fresh)


def test_two_caches_at_once(model: Model) -> None:
    embeddings = model.stored.embed(tokens(model.eager))[0].numpy()
    decoder = model.packages.rounding["decoder"]
    alone = Decoding(decoder).logits(embeddings[:30], [20, 1, 1, 8])
    one, other = Decoding(decoder), Decoding(decoder)
    found = [one.run(embeddings[:20], 0)]
    other.run(embeddings[40:80], 0)
    for at, size in ((20, 1), (21, 1), (22, 8)):
        found.append(one.run(embeddings[at : at + size], at))
        other.run(embeddings[:1], 40 + at)
    assert np.array_equal(np.stack(found), alone)


def test_cache_filled_to_the_end(model: Model) -> None:
    """A call of prefill that is filled up reaches behind the context; the cache has room for it."""
    eager = model.stored
    draw = np.random.default_rng(1)
    count = eager.spec.text.vocab_size
    embeddings = eager.embed([int(i) for i in draw.integers(0, count, eager.context)])
    chunks = [CHUNK, eager.context - CHUNK - 3, 2, 1]
    at = np.cumsum(chunks) - 1
    wanted = np.stack([whole_pass(eager, embeddings[:, : end + 1]) for end in at])
    got = Decoding(model.packages.exact["decoder"]).logits(embeddings[0].numpy(), chunks)
    assert off(got, wanted) <= model.tight


def test_picture_and_question_give_the_same_answer_as_torch(model: Model) -> None:
    """From pixels to greedy ids, all packages together, without rounding."""
    eager = model.stored
    ids, tiles = prompt_ids(eager, 1), random_tiles(1, eager.spec.vision.image_size)
    wanted = eager.greedy(eager.splice(ids, tiles), 8)
    embeddings = embed(model.packages.exact["token_embedding"], ids)
    places = np.array(ids) == eager.spec.image_token_id
    image_tokens = encode(model.packages.exact["vision_encoder"], tiles)
    embeddings[places] = image_tokens.reshape(-1, embeddings.shape[1])
    decoding, past = Decoding(model.packages.exact["decoder"]), len(ids)
    got = [int(decoding.run(embeddings, 0).argmax())]
    while len(got) < len(wanted):
        row = embed(model.packages.exact["token_embedding"], got[-1:])
        got.append(int(decoding.run(row, past).argmax()))
        past += 1
    assert got == wanted


def test_capacity_holds_the_context_and_a_filled_call() -> None:
    for context in (2, 63, 64, 65, 128, 8192):
        capacity = capacity_for(context)
        assert capacity % 32 == 0
        # The last call that can be begins at the last position and is filled up behind it.
        assert capacity >= context - 1 + CHUNK
        assert capacity < context + CHUNK + 32
