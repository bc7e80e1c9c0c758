"""The engine that runs a bundle's Core ML packages without a Mac."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import numpy as np
import pytest

from lorgnette.bundle import Bundle
from lorgnette.errors import BundleError
from lorgnette.quantize.plan import PLANS
from lorgnette.runtime.engines.coreml import EXACT, CoreMlEngine
from lorgnette.spec import ModelSpec
from lorgnette.targets.coreml.build import CHUNK, capacity_for
from tests.coreml import Packages, StoredEager, lower_all
from tests.eager import Eager, prompt_ids, random_tiles
from tests.helpers import make_checkpoint, tiny_config

LONG = CHUNK + 20
"""Positions that take two calls of prefill."""


@dataclass(frozen=True)
class Case:
    """A lowered model, and what torch computes of the same numbers."""

    packages: Packages
    stored: Eager
    engine: str
    context: int

    def bundle(self, spec: ModelSpec | None = None) -> Bundle:
        """As much of a bundle as the engine looks at."""
        manifest = SimpleNamespace(
            spec=spec or self.stored.spec,
            engine=self.engine,
            context_length=self.context,
            component=lambda name: SimpleNamespace(graph=f"graphs/{name}.mlpackage"),
        )
        made = SimpleNamespace(
            manifest=manifest,
            path=self.packages.folder,
            folder=lambda graph: self.packages.folder / Path(graph).name,
        )
        return cast("Bundle", made)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Eager:
    return Eager(make_checkpoint(tmp_path_factory.mktemp("checkpoint"), tiny_config()))


@pytest.fixture(scope="module", params=["fp32", "int4-fast"])
def case(
    request: pytest.FixtureRequest, plain: Eager, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    """A cache that is passed in and out, and one of states; nothing is rounded."""
    plan = PLANS[request.param]
    packages = lower_all(tmp_path_factory.mktemp("p") / "out", plain, plan)
    return Case(packages, StoredEager(plain.folder, plan), EXACT, plain.context)


def off(got: np.ndarray, wanted: np.ndarray) -> float:
    assert got.shape == wanted.shape
    assert got.dtype == np.float32
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def test_any_number_of_tiles(case: Case) -> None:
    engine = CoreMlEngine(case.bundle(), 1)
    tiles = random_tiles(3, case.stored.spec.vision.image_size)
    assert off(engine.encode(tiles), case.stored.encode(tiles).numpy()) <= 1e-4


@pytest.mark.parametrize("count", [1, 2, CHUNK, LONG])
def test_any_number_of_tokens(case: Case, count: int) -> None:
    ids = np.random.default_rng(0).integers(0, case.stored.spec.text.vocab_size, count)
    got = CoreMlEngine(case.bundle(), 1).embed(ids)
    assert got.dtype == np.float32
    assert np.array_equal(got, case.stored.embed(list(ids))[0].numpy())


def test_prompt_of_several_calls_then_tokens_one_by_one(case: Case) -> None:
    engine, eager = CoreMlEngine(case.bundle(), 1), case.stored
    ids, tiles = prompt_ids(eager, 2), random_tiles(2, eager.spec.vision.image_size)
    ids += [5] * (LONG - len(ids))
    embeddings = eager.splice(ids, tiles)
    wanted = eager.logits(embeddings, [LONG - 3, 1, 1, 1]).numpy()
    state = engine.new_state()
    assert state.capacity == case.context
    rows = embeddings[0].numpy()
    got = [state.run(rows[: LONG - 3], 0)]
    got += [state.run(rows[at : at + 1], at) for at in range(LONG - 3, LONG)]
    assert off(np.stack(got), wanted) <= 1e-4


def test_cache_is_cut_back_and_caches_stay_apart(case: Case) -> None:
    engine = CoreMlEngine(case.bundle(), 1)
    rows = case.stored.embed([i % 400 for i in range(LONG)])[0].numpy()
    fresh = engine.new_state()
    fresh.run(rows[:10], 0)
    wanted = fresh.run(rows[20:40], 10).copy()
    one, other = engine.new_state(), engine.new_state()
    one.run(rows, 0)
    other.run(rows[30:], 0)
    assert np.array_equal(one.run(rows[20:40], 10), wanted)


def test_more_than_the_context_is_refused(case: Case) -> None:
    state = CoreMlEngine(case.bundle(), 1).new_state()
    rows = np.zeros((3, case.stored.spec.text.hidden_size), np.float32)
    state.run(rows, case.context - 3)
    with pytest.raises(ValueError, match="positions in"):
        state.run(rows, case.context - 2)


def test_rounding_is_the_engines_name(case: Case) -> None:
    """Under `coreml` results are rounded where the program computes in float16."""
    exact, rounding = (
        CoreMlEngine(replace(case, engine=name).bundle(), 1) for name in (EXACT, "coreml")
    )
    tiles = random_tiles(1, case.stored.spec.vision.image_size)
    one, other = exact.encode(tiles), rounding.encode(tiles)
    half = case.stored.plan.name != "fp32"
    assert np.array_equal(one, other) != half
    assert np.array_equal(other, other.astype(np.float16).astype(np.float32)) == half


def changed(spec: ModelSpec, part: str, **numbers: int) -> ModelSpec:
    """The numbers of a model with some others."""
    inner = msgspec.structs.replace(getattr(spec, part), **numbers)
    return msgspec.structs.replace(spec, **{part: inner})


@pytest.mark.parametrize(
    ("part", "number", "value"),
    [
        ("vision", "image_size", 64),
        ("text", "vocab_size", 513),
        ("text", "layers", 2),
        ("text", "kv_heads", 4),
        ("text", "head_size", 32),
        ("text", "hidden_size", 32),
        ("projector", "patches_per_token", 16),
    ],
)
def test_packages_that_are_not_what_the_manifest_says(
    case: Case, part: str, number: str, value: int
) -> None:
    lying = changed(case.stored.spec, part, **{number: value})
    with pytest.raises(BundleError) as caught:
        CoreMlEngine(case.bundle(lying), 1)
    assert "\n" not in str(caught.value)


def test_context_that_the_cache_cannot_hold(case: Case) -> None:
    longest = capacity_for(case.context) - CHUNK + 1
    CoreMlEngine(replace(case, context=longest).bundle(), 1)
    with pytest.raises(BundleError, match="too small for the context"):
        CoreMlEngine(replace(case, context=longest + 1).bundle(), 1)
