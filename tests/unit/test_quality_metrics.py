"""Metrics of quality against sums written out by hand and against torch."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from lorgnette.manifest import Manifest, QualitySummary, decode_manifest, encode_manifest
from lorgnette.quantize import quality
from lorgnette.quantize.quality import cosines, kl_divergence, same_answer, same_top1, sqnr_db
from tests.small_bundle import MANIFEST

Matrix = NDArray[np.float32]


def pairs(most: int = 1000) -> st.SearchStrategy[tuple[Matrix, Matrix]]:
    """Two matrices of one shape."""
    shapes = st.tuples(st.integers(1, 4), st.integers(1, 9))

    def two(shape: tuple[int, int]) -> st.SearchStrategy[tuple[Matrix, Matrix]]:
        values = st.floats(-most, most, width=32)
        matrix = hnp.arrays(np.float32, shape, elements=values)
        return st.tuples(matrix, matrix)

    return shapes.flatmap(two)


def kl_by_hand(p_logits: list[float], q_logits: list[float]) -> float:
    """The definition, in Python's floats."""

    def log_softmax(row: list[float]) -> list[float]:
        total = math.fsum(math.exp(x - max(row)) for x in row)
        return [x - max(row) - math.log(total) for x in row]

    p, q = log_softmax(p_logits), log_softmax(q_logits)
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


@given(pairs())
def test_kl_divergence_is_the_definition(both: tuple[Matrix, Matrix]) -> None:
    got = kl_divergence(*both)
    assert got.dtype == np.float64
    assert (got >= 0).all()
    wanted = [kl_by_hand(a.tolist(), b.tolist()) for a, b in zip(*both, strict=True)]
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-12)


def test_kl_divergence_is_what_torch_computes() -> None:
    draw = np.random.default_rng(0)
    a = (draw.standard_normal((6, 5000)) * 4).astype(np.float32)
    b = a + draw.standard_normal(a.shape).astype(np.float32) * 0.1
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (a, b))
    wanted = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    np.testing.assert_allclose(kl_divergence(a, b), wanted.numpy(), rtol=1e-10)


def test_kl_divergence_has_a_direction() -> None:
    sure, unsure = np.array([[9, 0, 0]], np.float32), np.zeros((1, 3), np.float32)
    assert kl_divergence(sure, unsure)[0] == pytest.approx(math.log(3), abs=5e-3)
    assert kl_divergence(unsure, sure)[0] > 4


def test_kl_divergence_sees_no_constant_and_stands_large_logits() -> None:
    logits = np.array([[3e38, -3e38, 0], [1e4, 1e4 - 1, 0]], np.float32)
    assert (kl_divergence(logits, logits) == 0).all()
    small = np.array([[1, 2, 3]], np.float32)
    assert kl_divergence(small, small + 1000)[0] < 1e-12


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_diverge_by_infinity(bad: float) -> None:
    good = np.zeros((2, 3), np.float32)
    broken = good.copy()
    broken[1, 1] = bad
    assert kl_divergence(good, broken).tolist() == [0, math.inf]
    assert kl_divergence(broken, good).tolist() == [0, math.inf]


@given(pairs(3))
def test_top1_and_same_answer_are_those_of_the_likeliest(both: tuple[Matrix, Matrix]) -> None:
    firsts = [[row.index(max(row)) for row in matrix.tolist()] for matrix in both]
    wanted = [a == b for a, b in zip(*firsts, strict=True)]
    assert same_top1(*both).tolist() == wanted
    assert same_answer(*both) == all(wanted)


@given(pairs())
def test_cosines_are_the_definition(both: tuple[Matrix, Matrix]) -> None:
    got = cosines(*both)
    assert ((got >= -1) & (got <= 1)).all()
    for cosine, a, b in zip(got, *(matrix.tolist() for matrix in both), strict=True):
        sizes = math.hypot(*a) * math.hypot(*b)
        if sizes > 1e-100:
            dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
            assert cosine == pytest.approx(dot / sizes, abs=1e-9)


def test_cosines_of_nothing() -> None:
    zero, one = np.zeros((1, 4), np.float32), np.ones((1, 4), np.float32)
    assert cosines(zero, zero).tolist() == [1]
    assert cosines(zero, one).tolist() == [0]
    assert cosines(one, one * np.float32("nan")).tolist() == [-1]
    assert cosines(one, -one).tolist() == [-1]


@given(pairs())
def test_sqnr_is_the_definition(both: tuple[Matrix, Matrix]) -> None:
    weight, rounded = both
    noise = math.fsum(
        (a - b) ** 2 for a, b in zip(weight.ravel().tolist(), rounded.ravel().tolist(), strict=True)
    )
    signal = math.fsum(a * a for a in weight.ravel().tolist())
    got = sqnr_db(weight, rounded)
    assert (got is None) == (noise == 0)
    if got is not None and signal > 1e-290:
        assert got == pytest.approx(10 * math.log10(signal / noise), abs=1e-6)


def test_a_bit_of_an_integer_is_six_decibels(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(1).uniform(-1, 1, (64, 512)).astype(np.float32)

    def rounded(bits: int) -> Matrix:
        step = np.float32(2 / 2**bits)
        made: Matrix = (np.floor(weight / step) + np.float32(0.5)) * step
        return made

    got = [sqnr_db(weight, rounded(bits)) for bits in (4, 5, 8)]
    assert got == pytest.approx([6.02 * 4, 6.02 * 5, 6.02 * 8], abs=0.1)
    # In pieces it is the same.
    monkeypatch.setattr(quality, "_BLOCK", 3 * 512 + 7)
    assert sqnr_db(weight, rounded(4)) == pytest.approx(got[0], rel=1e-12)


def test_a_tensor_of_zeros_has_no_signal() -> None:
    zero = np.zeros((2, 2), np.float32)
    assert sqnr_db(zero, zero) is None
    got = sqnr_db(zero, zero + 1)
    assert got is not None
    assert got < -2000


@pytest.mark.parametrize("metric", [kl_divergence, same_top1, same_answer, cosines, sqnr_db])
def test_other_shapes_are_an_error(metric: object) -> None:
    assert callable(metric)
    with pytest.raises(ValueError, match=r"shapes differ: \(2, 3\) and \(1, 3\)"):
        metric(np.zeros((2, 3), np.float32), np.zeros((1, 3), np.float32))


SUMMARY = QualitySummary(
    sample_set="mine",
    sample_set_sha256="0" * 64,
    samples=3,
    skipped=1,
    positions=9,
    max_new_tokens=24,
    kl_mean=1e-4,
    kl_p95=2e-4,
    kl_max=3e-4,
    top1=1.0,
    same_answer=1.0,
    image_token_cosine_mean=0.999,
    image_token_cosine_min=0.99,
)


def test_a_manifest_carries_quality_and_older_ones_lack_it() -> None:
    measured = msgspec.structs.replace(MANIFEST, quality=SUMMARY)
    assert decode_manifest(encode_manifest(measured), "here") == measured
    older = {key: v for key, v in msgspec.to_builtins(MANIFEST).items() if key != "quality"}
    assert decode_manifest(msgspec.json.encode(older), "here") == MANIFEST
    assert msgspec.convert(older, Manifest).quality is None
