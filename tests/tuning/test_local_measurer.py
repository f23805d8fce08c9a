"""Candidates measured in a process of their own on this machine."""

import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from tvm.s_tir.meta_schedule.runner import RunnerInput

from agq_tvm.targets import load_device
from agq_tvm.tuning import measurer as measurer_module
from agq_tvm.tuning import reference
from agq_tvm.tuning.candidate import export_candidate, make_candidate
from agq_tvm.tuning.local_measurer import LocalMeasurer
from agq_tvm.tuning.measure import kind_of
from agq_tvm.tuning.runner import MeasuringRunner
from agq_tvm.tuning.workers import Worker, WorkerEnded
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
    # Whether it first meets a page that is not there, or the allocator finds its marks overwritten, is luck.
    endings = ("11 (Segmentation fault)", "6 (Aborted)")
    crashed = [f"crashed: its process was ended by signal {ending}" for ending in endings]
    assert outcome(measurer, "out of bounds", tmp_path).message in crashed
    assert outcome(measurer, "illegal", tmp_path).kind == "crashed"
    assert outcome(measurer, "exits", tmp_path).kind == "crashed"
    assert outcome(measurer, "fails", tmp_path).message == "failed: this is refused"
    begun = time.monotonic()
    assert outcome(measurer, "endless", tmp_path).message == "hung: no result within 2 s"
    assert time.monotonic() - begun < 30
    assert outcome(measurer, "right", tmp_path).message is None


def test_the_next_task_gets_the_same_worker(tmp_path):
    path, pids = candidate("right", HOST, tmp_path), []
    for _ in range(2):
        with LocalMeasurer(task_for(HOST), QUICK, timeout=60) as measurer:
            measurer._arguments = ARGUMENTS
            assert measurer.submit(path).result(timeout=120).message is None
            pids.append(measurer.crew.workers[0].pid)
    assert pids[0] == pids[1]


@pytest.mark.parametrize(("when", "kind"), [("its process starts", "lost"), ("it runs", "crashed")])
def test_closing_ends_a_candidate_while(when, kind, tmp_path, monkeypatch):
    start, begun, pids = Worker._start, threading.Event(), []

    def told(worker):
        if when == "its process starts":
            begun.set()
            time.sleep(0.5)  # meanwhile there is nothing, or only the last task's process, to kill
        start(worker)
        pids.append(worker.pid)
        begun.set()

    monkeypatch.setattr(Worker, "_start", told)
    with LocalMeasurer(task_for(HOST), QUICK, timeout=60) as measurer:
        measurer._arguments = ARGUMENTS
        future = measurer.submit(candidate("endless", HOST, tmp_path))
        assert begun.wait(60)
    assert future.result(timeout=0).kind == kind
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_a_worker_that_cannot_start_is_no_verdict_about_a_candidate(monkeypatch):
    monkeypatch.setattr("sys.executable", "false")
    monkeypatch.setattr("agq_tvm.tuning.worker_measurer.borrow", Worker)
    with LocalMeasurer(task_for(HOST), QUICK, timeout=60) as measurer:
        measurer._arguments = ARGUMENTS
        outcome = measurer.submit("none.so").result(timeout=60)
    assert outcome.kind == "lost" and "cannot be started: its process ended with code 1" in outcome.text


def test_a_worker_that_ended_before_it_was_asked_answers_the_next_time(monkeypatch):
    worker, start = Worker("here"), Worker._start

    def ended(worker):
        start(worker)
        worker._process.kill()
        worker._process.wait()

    try:
        with monkeypatch.context() as patch:
            patch.setattr(Worker, "_start", ended)
            with pytest.raises(WorkerEnded, match="signal 9"):
                worker.ask({"limit": 10}, 10)
        assert worker.ask({"limit": 10}, 10)["kind"] == "failed"  # there is nothing in this job
    finally:
        worker.close()


def test_metaschedule_gets_seconds_and_errors(tmp_path):
    runner = MeasuringRunner(LocalMeasurer(task_for(HOST), QUICK, 30))
    try:
        runner.measurer._arguments = ARGUMENTS
        paths = [candidate(behaviour, HOST, tmp_path) for behaviour in ("right", "wrong")]
        futures = runner.run([RunnerInput(path, "llvm", []) for path in paths])
        right, wrong = [future.result() for future in futures]
        assert all(future.done() for future in futures)
    finally:
        runner.close()
    assert right.error_msg is None
    assert len(right.run_secs) >= 1
    assert wrong.run_secs is None
    assert kind_of(wrong.error_msg) == "wrong"
    assert runner.outcomes[paths[0]].result().measurement.seconds


@pytest.mark.parametrize("exact", [True, False])
def test_a_kernel_without_a_formula_is_compared_with_the_hand_made_one(exact, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "expected_digest", lambda task, operands: None)
    monkeypatch.setattr(measurer_module, "is_exact", lambda task: exact)
    task = task_for(HOST)
    right = tmp_path / "right.so"
    export_candidate(make_candidate(task, None), HOST, right)
    with LocalMeasurer(task, QUICK, timeout=60) as measurer:
        (written,) = [argument for argument in measurer.arguments() if argument.written]
        assert (written.digest is not None, written.reference is not None) == (exact, not exact)
        assert measurer.submit(str(right)).result(timeout=120).message is None
        measurer._arguments = [
            replace(argument, digest=argument.digest and argument.digest + 1) for argument in measurer.arguments()
        ]
        if not exact:
            np.save(written.reference, np.load(written.reference) * 1.01)
        assert measurer.submit(str(right)).result(timeout=120).kind == "wrong"
