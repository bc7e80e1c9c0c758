"""Bundles side by side: how far from each other they may be, by numbers made up for it."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from lorgnette.errors import BundleError, VerifyError
from lorgnette.manifest import Bounds
from lorgnette.runtime.golden import Golden, GoldenText
from lorgnette.runtime.parity import Climbed, Comparison, Pair, compare_ladders
from lorgnette.runtime.verify import Ladder, Seen

Array = NDArray[np.float32]

TEXT = GoldenText(
    question="What?",
    tiles_sha256="0",
    rows=1,
    cols=1,
    prompt_ids=(1, 2, 3),
    original_greedy_ids=(4, 5),
    rounding_image_tokens=0.0,
    rounding_logits=0.0,
    rounding_activations=0.0,
)
LOOSE = Bounds(image_tokens=0.1, logits=0.1, greedy_ids_equal=False)
STRICT = Bounds(image_tokens=0.1, logits=0.1, greedy_ids_equal=True)


def numbers(*shape: int, by: float = 1.0) -> Array:
    """The same numbers each time, all multiplied: then relative errors are known."""
    drawn = np.random.default_rng(len(shape)).standard_normal(shape)
    return (drawn * by).astype(np.float32)


def climbed(
    name: str,
    *,
    image_tokens: Array | None = None,
    logits: Array | None = None,
    ids: tuple[int, ...] = (4, 5),
    text: GoldenText = TEXT,
    reference: float = 1.0,
    bounds: Bounds = LOOSE,
) -> Climbed:
    """A bundle that answered as its reference, where nothing else is said."""
    golden = Golden(
        text=text,
        picture=np.zeros((1, 1, 3), np.uint8),
        image_tokens=numbers(3, 4, 5, by=reference),
        logits=numbers(2, 9, by=reference),
    )
    seen = Seen(
        image_tokens=golden.image_tokens if image_tokens is None else image_tokens,
        logits=golden.logits if logits is None else logits,
        greedy_ids=ids,
    )
    return name, Ladder((), seen), golden, bounds


def failed(comparison: Comparison) -> list[tuple[str, str, str]]:
    return [(each.first, each.second, each.rung) for each in comparison.pairs if not each.passed]


def at(comparison: Comparison, rung: str) -> Pair:
    (found,) = (pair for pair in comparison.pairs if pair.rung == rung)
    return found


def test_bundles_that_answer_alike_agree_in_every_pair() -> None:
    comparison = compare_ladders([climbed(name) for name in "abc"])
    assert comparison.passed
    comparison.require("here")
    assert [(p.first, p.second, p.rung) for p in comparison.pairs] == [
        (one, other, rung)
        for one, other in ("ab", "ac", "bc")
        for rung in ("image_tokens", "logits", "greedy_ids")
    ]
    assert {pair.error for pair in comparison.pairs} == {0.0, None}


@pytest.mark.parametrize("rung", ["image_tokens", "logits"])
def test_each_may_be_as_far_off_as_its_own_bound_and_no_farther(rung: str) -> None:
    """0.1 and 0.1 are allowed; both are off, one up and the other down."""
    shape = {"image_tokens": (3, 4, 5), "logits": (2, 9)}[rung]

    def pair(up: float) -> Comparison:
        one = climbed("a", **{rung: numbers(*shape, by=up)})  # type: ignore[arg-type]
        return compare_ladders([one, climbed("b")])

    near, far = pair(1.19), pair(1.21)
    assert near.passed
    assert at(near, rung).error == pytest.approx(0.19, rel=1e-5)
    assert at(near, rung).bound == pytest.approx(0.2)
    assert failed(far) == [("a", "b", rung)]
    with pytest.raises(VerifyError, match=f"a and b disagree at rung '{rung}'") as told:
        far.require("here")
    assert "2.10e-01" in str(told.value)
    assert "<= 2.00e-01" in str(told.value)


@pytest.mark.parametrize(
    ("one", "other", "allowed"), [(0.01, 0.05, 0.06), (0.05, 0.01, 0.06), (0.0, 0.2, 0.2)]
)
def test_bounds_of_both_are_added(one: float, other: float, allowed: float) -> None:
    bounds = [Bounds(image_tokens=x, logits=2 * x, greedy_ids_equal=False) for x in (one, other)]
    comparison = compare_ladders([climbed("a", bounds=bounds[0]), climbed("b", bounds=bounds[1])])
    assert at(comparison, "image_tokens").bound == pytest.approx(allowed)
    assert at(comparison, "logits").bound == pytest.approx(2 * allowed)


def test_references_that_are_apart_let_bundles_be_as_far_apart_besides() -> None:
    """Two plans of one checkpoint: a bundle of the second, 1.3 times the first, is right."""
    first, second = climbed("a"), climbed("b", reference=1.3)
    comparison = compare_ladders([first, second])
    assert comparison.passed
    assert at(comparison, "logits").bound == pytest.approx(0.2 + 0.3 / 1.3, rel=1e-5)
    assert at(comparison, "logits").error == pytest.approx(0.3 / 1.3, rel=1e-5)
    farther = climbed("b", reference=1.3, logits=numbers(2, 9, by=1.9))  # 0.9 / 1.9 = 0.47
    assert failed(compare_ladders([first, farther])) == [("a", "b", "logits")]


def test_one_tile_or_step_that_is_off_is_enough() -> None:
    """It would be lost in the norm of all together."""
    tiles, steps = numbers(3, 4, 5), numbers(2, 9)
    tiles[2] *= 1e-3
    other_tiles = tiles.copy()
    other_tiles[2] *= 2
    comparison = compare_ladders(
        [climbed("a", image_tokens=other_tiles, logits=steps), climbed("b", image_tokens=tiles)]
    )
    assert failed(comparison) == [("a", "b", "image_tokens")]
    assert at(comparison, "image_tokens").error == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [(2, 4, 5), (4, 4, 5), (3, 4, 6)])
def test_other_shapes_are_infinitely_far(shape: tuple[int, ...]) -> None:
    comparison = compare_ladders([climbed("a"), climbed("b", image_tokens=numbers(*shape))])
    assert failed(comparison) == [("a", "b", "image_tokens")]
    assert at(comparison, "image_tokens").error == float("inf")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("first", [True, False])
def test_numbers_that_are_none_agree_with_nothing(value: float, step: int, first: bool) -> None:
    broken = numbers(2, 9)
    broken[step, 3] = value
    two = [climbed("a", logits=broken), climbed("b")]
    comparison = compare_ladders(two if first else two[::-1])
    assert [rung for _, _, rung in failed(comparison)] == ["logits"]


@pytest.mark.parametrize(
    ("one", "other", "required"),
    [(STRICT, STRICT, True), (STRICT, LOOSE, False), (LOOSE, STRICT, False), (LOOSE, LOOSE, False)],
)
def test_greedy_ids_must_be_equal_where_both_bundles_must_have_the_original_s(
    one: Bounds, other: Bounds, required: bool
) -> None:
    comparison = compare_ladders([climbed("a", bounds=one), climbed("b", bounds=other, ids=(4, 6))])
    assert comparison.passed is not required
    assert at(comparison, "greedy_ids").detail == "1 of 2 ids equal"
    if required:
        with pytest.raises(VerifyError, match="a and b disagree at rung 'greedy_ids'"):
            comparison.require("here")


def test_answers_of_other_lengths_are_not_equal() -> None:
    comparison = compare_ladders(
        [climbed("a", bounds=STRICT), climbed("b", bounds=STRICT, ids=(4, 5, 6))]
    )
    assert failed(comparison) == [("a", "b", "greedy_ids")]


def test_bundles_that_were_asked_something_else_are_refused() -> None:
    other = msgspec.structs.replace(TEXT, prompt_ids=(1, 2, 4))
    with pytest.raises(BundleError, match="asked different questions in a and b"):
        compare_ladders([climbed("a"), climbed("b", text=other)])


def test_bundles_of_other_models_are_refused() -> None:
    other = msgspec.structs.replace(TEXT, original_greedy_ids=(4, 6))
    with pytest.raises(BundleError, match="of different models in a and b"):
        compare_ladders([climbed("a"), climbed("b", text=other)])


def test_a_bundle_that_got_nowhere_is_not_compared() -> None:
    name, ladder, golden, bounds = climbed("b")
    fallen: Climbed = (name, replace(ladder, seen=None), golden, bounds)
    comparison = compare_ladders([climbed("a"), fallen, climbed("c")])
    assert {(pair.first, pair.second) for pair in comparison.pairs} == {("a", "c")}
