"""The benchmark of tuning: how ratios and their intervals come from pairs."""

from concurrent.futures import Future

import pytest

from agq_tvm.errors import AgqError
from agq_tvm.kernels import tunable
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.kernels.record_library import Library
from agq_tvm.targets import load_device
from agq_tvm.tuning.measure import Measurement
from agq_tvm.tuning.measurer import Outcome
from agq_tvm.tuning.task import make_task
from benchmarks.tuning import compare, gains, main

ROUNDS = 4


class Fake:
    """Measures from a list, the hand-made candidate's seconds and the tuned one's."""

    def __init__(self, default: list[float], tuned: list[float]):
        self.seconds = {"default": iter(default), "tuned": iter(tuned)}
        self.order: list[str] = []

    def submit(self, path: str) -> "Future[Outcome]":
        name = path.rpartition("/")[2].removesuffix(".so")
        self.order.append(name)
        seconds, future = next(self.seconds[name], None), Future()
        future.set_result(Outcome(Measurement([seconds])) if seconds else Outcome(None, "hung", "no result"))
        return future


@pytest.fixture(scope="module")
def task():
    device = load_device("x86-64-avx2")
    return make_task(LinearKernel(1, 32, 64, 4, 32, True, None, False), "avx2", device, 1)


@pytest.fixture(scope="module")
def point(task):
    return tunable.space_of(task.kernel, task.instruction_set, task.threads).points()[-1]


def test_a_ratio_is_that_of_neighbours(task, point):
    measurer = Fake([2.0, 20.0, 200.0, 2.0], [1.0, 10.0, 100.0, 1.0])
    found = compare(task, point, measurer, ROUNDS)
    assert (found.ratio, found.low, found.high) == pytest.approx((2, 2, 2)) and not found.slower
    assert measurer.order == ["default", "tuned", "tuned", "default"] * 2


def test_slower_means_beyond_doubt(task, point):
    assert not compare(task, point, Fake([1, 1, 1, 1], [1.1, 0.8, 1.2, 1.0]), ROUNDS).slower
    assert compare(task, point, Fake([1, 1, 1, 1], [1.1, 1.08, 1.12, 1.1]), ROUNDS).slower


def test_an_interval_of_few_pairs_is_wide(task, point):
    """Student's: of 4 pairs 3.18 standard errors, where 1.96 would be too sure."""
    found = compare(task, point, Fake([1, 1, 1, 1], [1.1, 1.0, 1.2, 1.1]), ROUNDS)
    assert (found.low, found.high) == pytest.approx((0.809, 1.026), abs=1e-3)


@pytest.mark.parametrize("rounds", ["1", "0", "-3", "x"])
def test_an_interval_needs_pairs(rounds, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tuning", "gains", "CKPT", "--rounds", rounds])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "--rounds" in capsys.readouterr().err


def test_what_is_not_measured_is_said(task, point, tmp_path):
    with pytest.raises(AgqError, match="tuned: hung"):
        compare(task, point, Fake([1, 1, 1, 1], []), ROUNDS)
    with pytest.raises(AgqError, match="run agq tune first"):
        gains([task], Library(tmp_path, device="x86-64-avx2"), ROUNDS)
