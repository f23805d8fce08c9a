"""Rank correlations, and what is compared."""

import math

import pytest

from agq_tvm.kernels.space import Space
from benchmarks.simulated import Candidate, comparisons, kendall, ranks, sample, spearman


def test_correlations_of_orders():
    rising = [1.0, 2.0, 5.0, 9.0]
    assert spearman(rising, [3.0, 4.0, 5.0, 100.0]) == kendall(rising, [3.0, 4.0, 5.0, 100.0]) == pytest.approx(1)
    assert spearman(rising, rising[::-1]) == kendall(rising, rising[::-1]) == pytest.approx(-1)
    assert spearman(rising, [2.0, 1.0, 3.0, 4.0]) == pytest.approx(0.8)
    assert kendall(rising, [2.0, 1.0, 3.0, 4.0]) == pytest.approx(4 / 6)
    assert math.isnan(spearman(rising, [1.0] * 4)) and math.isnan(kendall([2.0] * 4, rising))


def test_equal_values_share_their_ranks():
    assert ranks([2.0, 1.0, 2.0, 3.0]).tolist() == [1.5, 0, 1.5, 3]
    assert kendall([1.0, 1.0, 2.0], [1.0, 2.0, 3.0]) == pytest.approx(2 / math.sqrt(2 * 3))


def test_samples_are_the_same_points_every_time_with_the_default_first():
    space = Space({"a": tuple(range(10)), "b": tuple(range(10))}, {"a": 3, "b": 4})
    points = sample(space, 20)
    assert points == sample(space, 20) and points[0] == space.default and len(points) == 20
    assert len({tuple(point.values()) for point in sample(space, 200)}) == 100


def test_what_the_first_figure_puts_first_is_held_against_the_best():
    found = [Candidate({}, 30, 300.0, 2.0), Candidate({}, 20, 100.0, 4.0), Candidate({}, 10, 200.0, 1.0)]
    halves, counts, cycles = comparisons(found)
    assert (counts.regret, cycles.regret, cycles.default, cycles.worst) == (1, 4, 2, 4)
    assert halves.what == "instructions with cycles" and halves.regret == 2
    assert [one.what for one in comparisons([Candidate({}, 1, 1.0), Candidate({}, 2, 1.0)])] == [halves.what]
