"""The steps of a measurement, on a machine made up: what is noticed, waited for and reported."""

from contextlib import nullcontext

import numpy as np
import pytest

from agq_tvm.tuning import measure as measuring
from agq_tvm.tuning.drift import Drift
from agq_tvm.tuning.measure import Argument, Effort, MeasureError, Measurement, disagreement, measure

ARGUMENTS = [
    Argument((8,), "int8", "input"),
    Argument((16,), "int8", "cold"),
    Argument((8,), "int8", "output", digest=80),
]


class Machine:
    """Adds the operands; the fixed computation takes what `fixed` says, in turn."""

    def __init__(self, fixed=(1.0,), keeps_time: bool = True, add: int = 9, once: float = 1e-6):
        self.keeps_time, self._fixed, self._add, self._once = keeps_time, list(fixed), add, once
        self.sweeps, self.threads_of = [], None

    def threads(self, count):
        self.threads_of = count
        return nullcontext()

    def library(self, path):
        return {
            "fill_0": lambda x: x.fill(1),
            "fill_1": lambda x: x.fill(2),
            "fill_2": lambda x: x.fill(0),
            "main": lambda x, w, y: np.add(x, self._add, out=y),
            "digest_2": lambda y, out: out.fill(y.sum()),
        }.__getitem__

    def empty(self, shape, dtype):
        return np.full(shape, 77, dtype)

    def copies(self, tensor, count):
        return [tensor.copy() for _ in range(count)]

    def array(self, tensor):
        return tensor

    def time(self, name, arguments, repeats, milliseconds):
        if name == "fixed":
            return [self._fixed.pop(0) if len(self._fixed) > 1 else self._fixed[0]] * repeats
        if milliseconds == 0 and self.keeps_time:
            assert (len(arguments), repeats) == (4, 1)
            return [self._once]
        self.sweeps.append(arguments)
        return [float(len(self.sweeps))] * repeats


@pytest.fixture(autouse=True)
def rests(monkeypatch):
    """Seconds that were slept."""
    slept = []
    monkeypatch.setattr(measuring.time, "sleep", slept.append)
    return slept


EFFORT = Effort(4, 20, 0)


def measured(machine, effort=EFFORT, best=None, deadline=float("inf"), waits=True):
    return measure(machine, "path", ARGUMENTS, 3, effort, deadline, best, waits)


def test_a_steady_machine_is_measured_once(rests):
    machine = Machine()
    found, fixed = measured(machine, Effort(4, 20, 0, cooldown=0.5))
    assert (found.seconds, found.outliers, found.drift, found.hot) == ([1.0] * 4, 0, 1.0, False)
    assert (fixed, machine.threads_of, rests) == (1.0, 3, [0.5])


def test_cold_operands_are_copies_that_together_exceed_the_caches():
    machine = Machine()
    found, _ = measured(machine, Effort(2, 20, 60))
    (sweep,) = machine.sweeps
    assert sweep[0] == 3
    sets = [sweep[1 + 3 * call : 4 + 3 * call] for call in range(4)]
    assert len(sweep) == 1 + 3 * 4
    assert len({id(each[1]) for each in sets}) == 4
    assert all(each[0] is sets[0][0] and each[2] is sets[0][2] for each in sets)
    assert all((each[1] == 2).all() for each in sets)
    assert found.seconds == [0.25, 0.25]  # of one call


@pytest.mark.parametrize(("once", "calls"), [(0.01, 4), (0.05, 2), (0.3, 1)])
def test_what_takes_long_is_not_run_through_all_copies(once, calls):
    machine = Machine(once=once)
    measured(machine, Effort(2, 20, 60))
    (sweep,) = machine.sweeps
    assert len(sweep) == 1 + 3 * calls


def test_a_slow_processor_rests_and_is_measured_again(rests):
    found, fixed = measured(Machine(fixed=[1.0, 1.2, 1.1, 1.1, 1.0, 1.0]))
    assert (found.seconds[0], found.hot, fixed) == (3.0, False, 1.0)
    assert rests == [0.0, 2.0, 4.0]


def test_one_that_stays_slow_is_told_so():
    found, fixed = measured(Machine(fixed=[1.3]), best=1.0)
    assert found.hot
    assert found.drift == pytest.approx(1.3)
    assert fixed == 1.0


def test_one_that_stayed_slow_is_not_waited_for_again(rests):
    found, _ = measured(Machine(fixed=[1.3]), best=1.0, waits=False)
    assert found.hot and rests == [0.0]
    drift = Drift()
    for hot, slow in ((False, []), (True, ["b"]), (True, ["b"]), (False, [])):
        drift.note("b", 2.0 if hot else 1.0, hot)
        assert (drift.slow(), drift.best()) == (slow, {"b": 1.0})
    drift.note("emulated", None, False)
    assert drift.best() == {"b": 1.0}


def test_no_rest_goes_beyond_the_time_limit(rests):
    found, _ = measured(Machine(fixed=[1.3]), best=1.0, deadline=0.0)
    assert found.hot
    assert rests == [0.0]


def test_where_time_means_nothing_nothing_is_waited_for(rests):
    machine = Machine(fixed=[], keeps_time=False)
    found, fixed = measured(machine, Effort(4, 20, 1 << 20))
    assert (fixed, found.hot, rests) == (None, False, [0.0])
    assert len(machine.sweeps[0]) == 4


def test_wrong_results_are_found_before_anything_is_timed():
    machine = Machine(add=8)
    with pytest.raises(MeasureError, match="wrong: argument 2 differs from the reference") as error:
        measured(machine)
    assert (error.value.kind, machine.sweeps) == ("wrong", [])


def test_outliers_and_spread():
    found = measuring._summary([1.0, 1.0, 1.1, 1.0, 9.0], 1.0)
    assert (found.outliers, found.median, found.kept) == (1, 1.0, [1.0, 1.0, 1.1, 1.0])
    assert found.spread > 0
    assert Measurement([2.0]).kept == [2.0]
    assert measuring._summary([2.0], 1.0).spread == 0


@pytest.mark.parametrize(
    ("found", "expected", "told"),
    [
        (np.float32([1, 2]), np.float32([1, 2.0001]), None),
        (np.float32([1, 2]), np.float32([1, 2.1]), "of the largest"),
        (np.float32([1, np.nan]), np.float32([1, 2]), "not finite"),
        (np.float32([0, 0]), np.float32([0, 0]), None),
        (np.int8([1] * 200), np.int8([1] * 199 + [2]), None),
        (np.int8([1] * 200), np.int8([1] * 190 + [2] * 10), "5.0 % of its integers"),
        (np.int8([1] * 200), np.int8([1] * 199 + [4]), "codes by 3"),
        (np.int8([-128]), np.int8([127]), "codes by 255"),
        (np.int32([100] * 10), np.int32([101] * 10), None),
        (np.int32([100] * 10), np.int32([110] * 10), "100.0 % of its integers"),
    ],
)
def test_results_that_depend_on_the_order_of_sums(found, expected, told):
    said = disagreement(found, expected)
    assert said is None if told is None else told in said
