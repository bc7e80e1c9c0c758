"""Whether bundles of one model agree with each other: ladders side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from lorgnette.errors import BundleError, VerifyError
from lorgnette.manifest import Bounds
from lorgnette.runtime.golden import Golden
from lorgnette.runtime.verify import Ladder, relative_error

Climbed = tuple[str, Ladder, Golden, Bounds]
"""A bundle's name, the ladder it climbed, what it was compared with, and within which bounds."""


@dataclass(frozen=True)
class Pair:
    """How far two bundles are from each other at one rung.

    Attributes:
        rung: `image_tokens`, `logits` or `greedy_ids`.
        first: Name of one bundle.
        second: Name of the other.
        passed: Whether they are as near as the bounds of both allow.
        detail: What came out.
        error: The largest relative error, of tiles or steps; None of ids.
        bound: What it may be.
    """

    rung: str
    first: str
    second: str
    passed: bool
    detail: str
    error: float | None = None
    bound: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Every pair of bundles at every rung that both reached."""

    pairs: tuple[Pair, ...]

    @property
    def passed(self) -> bool:
        """Whether all agree."""
        return all(pair.passed for pair in self.pairs)

    def require(self, where: object) -> None:
        """Refuses bundles that disagree.

        Raises:
            VerifyError: Naming the first two that do.
        """
        for pair in self.pairs:
            if not pair.passed:
                raise VerifyError(
                    f"{pair.first} and {pair.second} disagree at rung '{pair.rung}'",
                    where=where,
                    got=pair.detail,
                    wanted=None if pair.bound is None else f"<= {pair.bound:.2e}",
                )


def compare_ladders(climbed: Sequence[Climbed]) -> Comparison:
    """Compares what bundles answered with each other.

    Two bundles may be as far apart as each may be from its reference, and as their references are:
    nothing where weights are rounded by one plan, the rounding itself where by two.

    Raises:
        BundleError: They are of different models, or were asked different questions.
    """
    pairs: list[Pair] = []
    for (first, one, golden, bounds), (second, other, second_golden, second_bounds) in combinations(
        climbed, 2
    ):
        if golden.text.prompt_ids != second_golden.text.prompt_ids:
            raise BundleError(
                "bundles were asked different questions",
                where=f"{first} and {second}",
                hint="compare bundles of one checkpoint, made with the same sizes of pictures",
            )
        if golden.text.original_greedy_ids != second_golden.text.original_greedy_ids:
            raise BundleError(
                "bundles are of different models",
                where=f"{first} and {second}",
                hint="compare bundles of one checkpoint",
            )
        if one.seen is None or other.seen is None:
            continue
        strict = bounds.greedy_ids_equal and second_bounds.greedy_ids_equal
        for rung in ("image_tokens", "logits"):
            allowed = getattr(bounds, rung) + getattr(second_bounds, rung)
            allowed += _farthest(getattr(golden, rung), getattr(second_golden, rung))
            error = _farthest(getattr(one.seen, rung), getattr(other.seen, rung))
            passed = error <= allowed
            detail = f"relative error {error:.2e}"
            pairs.append(Pair(rung, first, second, passed, detail, error, allowed))
        pairs.append(_ids(first, second, one.seen.greedy_ids, other.seen.greedy_ids, strict))
    return Comparison(tuple(pairs))


def _farthest(got: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """The largest relative error of any tile or step; infinite where there are not as many.

    Numbers of one that are none make errors that are none, which no maximum would show.
    """
    if len(got) != len(wanted):
        return float("inf")
    errors = [relative_error(*pair) for pair in zip(got, wanted, strict=True)]
    return max(errors) if all(map(math.isfinite, errors)) else float("inf")


def _ids(first: str, second: str, one: Sequence[int], other: Sequence[int], strict: bool) -> Pair:
    same = sum(a == b for a, b in zip(one, other, strict=False))
    most = max(len(one), len(other))
    detail = f"{same} of {most} ids equal"
    return Pair("greedy_ids", first, second, same == most or not strict, detail)
