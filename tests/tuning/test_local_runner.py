"""Candidates measured in a process of their own on this machine."""

import os
import time

import pytest

from agq_tvm.targets import load_device
from agq_tvm.tuning.local_runner import LocalMeasurer
from tests.tuning.candidates import ARGUMENTS, QUICK, candidate, task_for

HOST = load_device("host")


@pytest.fixture
def measurer():
    with LocalMeasurer(task_for(HOST), QUICK, timeout=2) as made:
        made._arguments = ARGUMENTS
        yield made


def outcome(measurer, behaviour: str, folder):
    return measurer.submit(candidate(behaviour, HOST, folder)).result(timeout=120)


def test_a_right_candidate_is_timed(measurer, tmp_path):
    found = outcome(measurer, "slow", tmp_path)
    assert found.message is None
    assert len(found.measurement.seconds) == 3
    assert 0.03 <= found.measurement.median < 1
    assert measurer.drift.best().keys() == {""}


def test_whatever_a_candidate_does_the_next_is_measured(measurer, tmp_path):
    assert outcome(measurer, "wrong", tmp_path).kind == "wrong"
    assert outcome(measurer, "out of bounds", tmp_path).message == (
        "crashed: its process was ended by signal 11 (Segmentation fault)"
    )
    assert outcome(measurer, "illegal", tmp_path).kind == "crashed"
    assert outcome(measurer, "exits", tmp_path).kind == "crashed"
    assert outcome(measurer, "fails", tmp_path).message == "failed: this is refused"
    begun = time.monotonic()
    assert outcome(measurer, "endless", tmp_path).message == "hung: no result within 2 s"
    assert time.monotonic() - begun < 30
    assert outcome(measurer, "right", tmp_path).message is None


def test_closing_ends_the_worker(tmp_path):
    with LocalMeasurer(task_for(HOST), QUICK, timeout=60) as measurer:
        measurer._arguments = ARGUMENTS
        future = measurer.submit(candidate("endless", HOST, tmp_path))
        deadline = time.monotonic() + 60
        while not (pid := measurer._workers[0].pid) and time.monotonic() < deadline:
            time.sleep(0.05)
    assert future.result(timeout=30).kind == "crashed"
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
