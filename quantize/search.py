"""Choosing one candidate for each part of a model, from what each costs and what it loses.

Losses are taken to add up. Then the best choices of all budgets together are found part by part:
those on the lower convex hull of a part's candidates, taken in the order of what they lose for
what they save.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Candidate(NamedTuple):
    """One way to store a part."""

    loss: float
    """What is lost where this part alone is stored so; 0 or more."""
    cost: int
    """Bytes or bits."""


class Point(NamedTuple):
    """One candidate for each part, by number."""

    chosen: tuple[int, ...]
    loss: float
    """The sum of the losses."""
    cost: int
    """The sum of the costs."""


def total(parts: Sequence[Sequence[Candidate]], chosen: Sequence[int]) -> Point:
    """The point of some choices."""
    taken = [candidates[number] for candidates, number in zip(parts, chosen, strict=True)]
    loss = math.fsum(candidate.loss for candidate in taken)
    return Point(tuple(chosen), loss, sum(candidate.cost for candidate in taken))


def frontier(parts: Sequence[Sequence[Candidate]]) -> list[Point]:
    """The points from least loss to least cost, each the least loss for its cost.

    The first takes of every part the candidate of least loss. From each point, the part moves that
    loses least for what it saves. No choice whatever costs no more than one of the points and loses
    less; between two of them, others may be better than the first.

    Args:
        parts: The candidates of each part, one or more; losses are finite.

    Source: Everett 1963, "Generalized Lagrange Multiplier Method for Solving Problems of Optimum
    Allocation of Resources", Operations Research 11 (what the hull gives is optimal for its cost).
    """
    hulls = [hull(candidates) for candidates in parts]
    moves = sorted(
        (_slope(parts[part][before], parts[part][after]), part, at)
        for part, numbers in enumerate(hulls)
        for at, (before, after) in enumerate(pairwise(numbers))
    )
    chosen = [numbers[0] for numbers in hulls]
    points = [total(parts, chosen)]
    for _, part, at in moves:  # slopes rise along a hull, so that its moves come in order
        chosen[part] = hulls[part][at + 1]
        points.append(total(parts, chosen))
    return points


def hull(candidates: Sequence[Candidate]) -> list[int]:
    """Numbers of the candidates on the lower convex hull, from least loss to least cost."""
    order = sorted(range(len(candidates)), key=lambda n: (candidates[n].loss, candidates[n].cost))
    found: list[int] = []
    for number in order:
        if found and candidates[number].cost >= candidates[found[-1]].cost:
            continue
        while len(found) > 1 and _slope(candidates[found[-2]], candidates[found[-1]]) >= _slope(
            candidates[found[-1]], candidates[number]
        ):
            found.pop()
        found.append(number)
    return found


def spend(parts: Sequence[Sequence[Candidate]], point: Point, budget: int) -> Point:
    """A point that uses what a budget leaves over: the part that gains most moves, while any can.

    Args:
        parts: The candidates of each part.
        point: A point within the budget.
        budget: The highest cost.
    """
    while True:
        gains = [
            (now.loss - other.loss, now.cost - other.cost, part, number)
            for part, candidates in enumerate(parts)
            for now in (candidates[point.chosen[part]],)
            for number, other in enumerate(candidates)
            if other.loss < now.loss and point.cost - now.cost + other.cost <= budget
        ]
        if not gains:
            return point
        _, _, part, number = max(gains)
        point = total(parts, [*point.chosen[:part], number, *point.chosen[part + 1 :]])


def _slope(before: Candidate, after: Candidate) -> float:
    """What is lost for what is saved."""
    return (after.loss - before.loss) / (before.cost - after.cost)
