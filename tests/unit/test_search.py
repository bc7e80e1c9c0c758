"""Choosing candidates: against every combination there is."""

from __future__ import annotations

import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from lorgnette.quantize.search import Candidate, Point, frontier, hull, spend, total

Table = list[list[Candidate]]

candidates = st.builds(
    Candidate,
    loss=st.floats(0, 8, allow_nan=False).map(lambda value: round(value, 2)),
    cost=st.integers(1, 40),
)
tables = st.lists(st.lists(candidates, min_size=1, max_size=4), min_size=1, max_size=4)


def everything(table: Table) -> list[Point]:
    """Every combination, which is the oracle."""
    return [
        total(table, chosen) for chosen in itertools.product(*(range(len(part)) for part in table))
    ]


def near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)


@settings(max_examples=300, deadline=None)
@given(table=tables)
def test_no_combination_as_small_as_a_point_loses_less(table: Table) -> None:
    every = everything(table)
    for point in frontier(table):
        best = min(other.loss for other in every if other.cost <= point.cost)
        assert near(point.loss, best)


@settings(max_examples=300, deadline=None)
@given(table=tables)
def test_points_lead_from_the_least_loss_to_the_least_cost(table: Table) -> None:
    points, every = frontier(table), everything(table)
    assert near(points[0].loss, min(point.loss for point in every))
    assert points[-1].cost == min(point.cost for point in every)
    for before, after in itertools.pairwise(points):
        assert after.cost < before.cost
        assert after.loss >= before.loss
    slopes = [(b.loss - a.loss) / (a.cost - b.cost) for a, b in itertools.pairwise(points)]
    assert all(a <= b + 1e-6 for a, b in itertools.pairwise(slopes))


@settings(max_examples=200, deadline=None)
@given(table=tables, budget=st.integers(4, 160))
def test_what_a_budget_leaves_over_is_spent_and_no_more(table: Table, budget: int) -> None:
    within = next((point for point in frontier(table) if point.cost <= budget), None)
    every = [point for point in everything(table) if point.cost <= budget]
    if within is None:
        assert not every
        return
    spent = spend(table, within, budget)
    assert spent.cost <= budget
    assert min(point.loss for point in every) - 1e-9 <= spent.loss <= within.loss + 1e-9
    assert spent == total(table, spent.chosen)
    for part, number in enumerate(spent.chosen):  # no part can move to a lesser loss any more
        for other in range(len(table[part])):
            moved = total(table, [*spent.chosen[:part], other, *spent.chosen[part + 1 :]])
            assert moved.cost > budget or table[part][other].loss >= table[part][number].loss


def test_between_two_points_a_budget_is_used_up() -> None:
    table = [
        [Candidate(0.0, 10), Candidate(9.0, 1)],
        [Candidate(0.0, 4), Candidate(1.0, 2)],
        [Candidate(0.0, 3), Candidate(1.2, 1)],
    ]
    assert [(point.cost, point.loss) for point in frontier(table)] == [
        (17, 0.0),
        (15, 1.0),
        (13, 2.2),
        (4, 11.2),
    ]
    assert spend(table, frontier(table)[3], 12) == Point((1, 0, 0), 9.0, 8)


def test_what_is_above_the_hull_is_left_out() -> None:
    part = [Candidate(0.0, 8), Candidate(6.0, 4), Candidate(6.5, 2), Candidate(0.0, 9)]
    assert hull(part) == [0, 2]
    assert hull([Candidate(1.0, 3)]) == [0]
