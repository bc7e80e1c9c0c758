"""Sampling against transformers' logits processors, and its random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lorgnette.errors import BundleError, RequestError
from lorgnette.runtime.rng import SplitMix64
from lorgnette.runtime.sampler import Sampler, SamplingParams, candidates

Logits = NDArray[np.float32]


@pytest.mark.parametrize(
    ("seed", "wanted"),
    [
        # Published for splitmix64.c; the second series also in Rosetta Code's task.
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]),
        (
            1234567,
            [
                6457827717110365317,
                3203168211198807973,
                9817491932198370423,
                4593380528125082431,
                16408922859458223821,
            ],
        ),
    ],
)
def test_splitmix64_gives_the_published_numbers(seed: int, wanted: list[int]) -> None:
    rng = SplitMix64(seed)
    assert [rng.next_u64() for _ in wanted] == wanted


def test_uniform_takes_the_upper_53_bits() -> None:
    assert SplitMix64(0).uniform() == (0xE220A8397B1DCDAF >> 11) / 2**53
    assert SplitMix64(2**64 - 1).uniform() < 1


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True])
def test_bad_seeds_are_refused(seed: Any) -> None:
    with pytest.raises(RequestError, match="seed"):
        SplitMix64(seed)
    with pytest.raises(RequestError, match="seed"):
        SamplingParams(seed=seed)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", 1e-5),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("temperature", "1"),
        ("top_k", -1),
        ("top_k", 1.0),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", 101),
        ("repetition_penalty", float("nan")),
    ],
)
def test_params_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})


def random_logits(seed: int, size: int = 500, spread: float = 4.0) -> Logits:
    return np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)


def reference(
    logits: Logits, history: list[int], params: SamplingParams
) -> tuple[Logits, NDArray[np.float64]]:
    """What transformers makes of the logits, and the probabilities it samples from."""
    import torch
    from transformers.generation import logits_process as hf

    ids = torch.tensor([history], dtype=torch.int64)
    scores = torch.from_numpy(logits)[None]
    if params.repetition_penalty != 1:
        scores = hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    if params.temperature not in (0, 1):
        scores = hf.TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.top_k:
        scores = hf.TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = hf.TopPLogitsWarper(params.top_p)(ids, scores)
    return scores[0].numpy(), torch.softmax(scores[0].double(), -1).numpy()


@given(
    seed=st.integers(0, 2**32),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.8]),
    top_k=st.sampled_from([0, 1, 2, 40, 300, 500, 1000]),
    top_p=st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]),
    penalty=st.sampled_from([1.0, 1.3, 0.8]),
    spread=st.sampled_from([0.05, 1.0, 5.0]),
)
@settings(max_examples=150, deadline=None)
def test_the_surviving_set_and_probabilities_are_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, penalty: float, spread: float
) -> None:
    logits = random_logits(seed, spread=spread)
    history = np.random.default_rng(seed + 1).integers(0, 500, 60).tolist()
    params = SamplingParams(temperature, top_k, top_p, penalty)
    wanted_scores, wanted = reference(logits, history, params)

    sampler = Sampler(params, 500)
    scores = sampler._penalised(logits, history) / np.float32(temperature)
    alive = np.isfinite(wanted_scores)
    np.testing.assert_array_equal(scores[alive], wanted_scores[alive])

    ids, running, total = candidates(scores, sampler._top_k, top_p)
    if top_p == 1 and sampler._top_k == 0:
        assert alive.all()
        np.testing.assert_array_equal(scores[ids], np.sort(scores)[::-1][: len(ids)])
        np.testing.assert_allclose(np.diff(running, prepend=0) / total, wanted[ids], atol=1e-13)
        return
    # The reference adds up in float32: within that error of the threshold one id may differ.
    ours = np.zeros(500, dtype=bool)
    ours[ids] = True
    if not np.array_equal(ours, alive):
        assert np.count_nonzero(ours != alive) <= 2
        assert boundary_distance(scores, sampler._top_k, top_p) < 1e-5
        return
    assert total == running[-1]
    np.testing.assert_allclose(np.diff(running, prepend=0) / total, wanted[ids], atol=1e-13)


def boundary_distance(scores: Logits, top_k: int, top_p: float) -> float:
    """How near the running probability comes to the top-p threshold."""
    ordered = np.sort(scores.astype(np.float64))[::-1]
    ordered = ordered[ordered >= ordered[top_k - 1]] if top_k else ordered
    shares = np.cumsum(np.exp(ordered - ordered[0]))
    return float(np.abs(shares / shares[-1] - top_p).min())


def naive_choice(scores: Logits, uniform: float, top_k: int, top_p: float) -> int:
    """The steps as the module's docstring states them, with a full sort."""
    size = len(scores)
    order = sorted(range(size), key=lambda i: (-float(scores[i]), i))
    if 0 < top_k < size:
        order = [i for i in order if scores[i] >= scores[order[top_k - 1]]]
    weight = {i: float(np.exp(np.float64(scores[i]) - np.float64(scores.max()))) for i in order}
    mass = 0.0
    for i in order if len(order) < size else range(size):
        mass += weight[i]
    if top_p < 1:
        kept: list[int] = []
        before = 0.0
        for i in order:
            if kept and before >= top_p * mass:
                break
            kept.append(i)
            before += weight[i]
        order, mass = kept, before
    before = 0.0
    for i in order:
        before += weight[i]
        if before > uniform * mass:
            return i
    return max(i for i in order if weight[i] > 0)


@given(
    data=st.data(),
    size=st.integers(1, 700),
    top_k=st.sampled_from([0, 1, 5, 64, 65, 900]),
    top_p=st.sampled_from([0.2, 0.95, 1.0]),
)
@settings(max_examples=150, deadline=None)
def test_draws_follow_the_written_steps(
    data: st.DataObject, size: int, top_k: int, top_p: float
) -> None:
    seed = data.draw(st.integers(0, 2**32))
    # Coarse values make ties common; a small spread makes the tail long.
    step = data.draw(st.sampled_from([0.0, 0.5]))
    logits = random_logits(seed, size, data.draw(st.sampled_from([0.1, 3.0])))
    if step:
        logits = (np.round(logits / step) * step).astype(np.float32)
    sampler = Sampler(SamplingParams(1.0, top_k, top_p, seed=seed), size)
    uniforms = SplitMix64(seed)
    for _ in range(5):
        assert sampler.next(logits, []) == naive_choice(logits, uniforms.uniform(), top_k, top_p)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(1.0, seed=5),
        SamplingParams(1.5, top_k=6, seed=6),
        SamplingParams(0.8, top_p=0.9, seed=7),
        SamplingParams(1.2, 10, 0.8, 1.4, seed=8),
    ],
)
def test_draws_have_the_reference_distribution(params: SamplingParams) -> None:
    logits = random_logits(3, 20, 1.0)
    history = [1, 4, 4, 9]
    _, wanted = reference(logits, history, params)
    sampler = Sampler(params, 20)
    count = 5_000
    drawn = np.bincount([sampler.next(logits, history) for _ in range(count)], minlength=20)
    alive = wanted > 0
    assert drawn[~alive].sum() == 0
    expected = wanted[alive] * count
    chi_square = float(((drawn[alive] - expected) ** 2 / expected).sum())
    # Mean n - 1, variance 2 (n - 1): four standard deviations, with the seed fixed.
    freedom = int(alive.sum()) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_greedy_takes_the_highest_and_the_lowest_id_among_equals() -> None:
    logits = np.array([0, 3, 3, -1, 3], dtype=np.float32)
    assert Sampler(SamplingParams(), 5).next(logits, [1, 1]) == 1
    penalised = Sampler(SamplingParams(repetition_penalty=1.1), 5)
    assert penalised.next(logits, [1]) == 2
    assert penalised.next(logits, [1, 2]) == 4
    # Another conversation: nothing of the last one is left.
    assert penalised.next(logits, [2]) == 1
    np.testing.assert_array_equal(logits, np.array([0, 3, 3, -1, 3], dtype=np.float32))


@given(seed=st.integers(0, 1000), penalty=st.sampled_from([0.5, 1.2, 2.0]))
@settings(max_examples=50, deadline=None)
def test_the_penalty_grows_with_the_history(seed: int, penalty: float) -> None:
    history: list[int] = []
    sampler = Sampler(SamplingParams(repetition_penalty=penalty), 50)
    for step in range(8):
        logits = random_logits(1000 * seed + step, 50, 1.0)
        wanted, _ = reference(logits, history, sampler.params) if history else (logits, None)
        token = sampler.next(logits, history)
        assert token == int(np.argmax(wanted))
        history.append(token)


def test_the_same_seed_repeats_and_another_does_not() -> None:
    logits = random_logits(1, 49280, 1.0)

    def draw(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(1.0, seed=seed), 49280)
        return [sampler.next(logits, []) for _ in range(12)]

    assert draw(1) == draw(1) != draw(2)


def test_draws_at_the_edges(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SplitMix64, "uniform", lambda self: 1.0)  # beyond what rounding can do
    logits = np.array([5, 4, -2000, 4], dtype=np.float32)
    assert Sampler(SamplingParams(1.0), 4).next(logits, []) == 3
    assert Sampler(SamplingParams(1.0, top_k=2), 4).next(logits, []) == 3
    monkeypatch.setattr(SplitMix64, "uniform", lambda self: 0.0)
    assert Sampler(SamplingParams(1.0), 4).next(logits, []) == 0
    # A running sum must exceed the drawn point; meeting it is not enough.
    monkeypatch.setattr(SplitMix64, "uniform", lambda self: 0.5)
    assert Sampler(SamplingParams(1.0), 2).next(np.zeros(2, dtype=np.float32), []) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(bad: float, temperature: float) -> None:
    logits = np.zeros(8, dtype=np.float32)
    logits[3] = bad
    with pytest.raises(BundleError, match="1 of 8"):
        Sampler(SamplingParams(temperature), 8).next(logits, [])


def test_overflow_by_temperature_or_penalty_is_an_error_not_a_choice() -> None:
    logits = np.array([3e38, 1, -3e38], dtype=np.float32)
    with pytest.raises(BundleError, match="not all finite"):
        Sampler(SamplingParams(1e-3), 3).next(logits, [])
    with pytest.raises(BundleError, match="not all finite"):
        Sampler(SamplingParams(repetition_penalty=2.0), 3).next(logits, [2])


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.zeros(7, dtype=np.float32),
        lambda: np.zeros((1, 8), dtype=np.float32),
        lambda: np.zeros(8, dtype=np.float64),
    ],
)
def test_logits_of_another_form_are_an_error(make: Callable[[], Any]) -> None:
    with pytest.raises(BundleError, match=r"wanted float32 \[8\]"):
        Sampler(SamplingParams(), 8).next(make(), [])


def test_history_outside_the_vocabulary_is_refused_and_leaves_no_trace() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=3.0), 4)
    logits = np.array([1, 2, 0, 0], dtype=np.float32)
    for bad in (-1, 4):
        with pytest.raises(RequestError, match="history"):
            sampler.next(logits, [1, bad])
    assert sampler.next(logits, []) == 1
    with pytest.raises(RequestError, match="vocabulary is empty"):
        Sampler(SamplingParams(), 0)
