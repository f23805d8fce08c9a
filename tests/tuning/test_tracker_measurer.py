"""Candidates measured on emulated boards behind a real tracker, and everything that may happen to those."""

import os
import signal
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from agq_tvm.boards import processes
from agq_tvm.boards.tracker import parse_tracker, tracker_summary
from agq_tvm.errors import AgqError
from agq_tvm.flow.doctor_boards import look_at_boards
from agq_tvm.targets import load_device
from agq_tvm.tuning.tracker_measurer import TrackerMeasurer, fleet_of
from agq_tvm.tuning.worker import _verdict
from tests.tuning.candidates import ARGUMENTS, QUICK, candidate, task_for
from tests.tuning.conftest import BOARD

pytestmark = pytest.mark.emulator

LONG = 240
"""Seconds after which a test has failed; nothing here should take that long."""


def measurer_of(fleet, timeout: float = 20, patience: float = 120, effort=QUICK) -> TrackerMeasurer:
    measurer = TrackerMeasurer(task_for(BOARD), fleet.address, fleet.key, effort, timeout, patience)
    measurer._arguments = ARGUMENTS
    return measurer


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def kinds(futures: list[Future]) -> list[str]:
    return [future.result(timeout=LONG).kind for future in futures]


def test_whatever_a_candidate_does_the_board_lives_on(fleet, folder):
    board = fleet.add()
    with measurer_of(fleet, timeout=3) as measurer:
        behaviours = ("right", "wrong", "out of bounds", "illegal", "exits", "fails", "endless", "right")
        futures = [measurer.submit(candidate(behaviour, BOARD, folder)) for behaviour in behaviours]
        assert kinds(futures) == ["", "wrong", "crashed", "crashed", "crashed", "failed", "hung", ""]
    texts = [future.result().text for future in futures]
    assert "signal 11 (Segmentation fault)" in texts[2]
    assert "session has expired" in texts[6]
    assert board.alive()
    measured = futures[0].result().measurement
    assert measured.emulated
    assert measured.status["memory_bytes"] > 0
    assert measured.board.startswith("127.0.0.1:")


def test_boards_measure_side_by_side(fleet, folder):
    fleet.add()
    fleet.add()
    path = candidate("slow", BOARD, folder)
    with measurer_of(fleet) as measurer:
        outcomes = [future.result(timeout=LONG) for future in [measurer.submit(path) for _ in range(6)]]
    assert [outcome.kind for outcome in outcomes] == [""] * 6
    assert len({outcome.measurement.board for outcome in outcomes}) == 2


def test_a_board_that_dies_is_no_verdict(fleet, folder):
    first = fleet.add()
    with measurer_of(fleet, timeout=60) as measurer:
        future = measurer.submit(candidate("slow", BOARD, folder))
        wait_until(lambda: "session begins" in Path(first.log).read_text().partition("session ended")[2])
        fleet.kill(first)
        time.sleep(1)
        assert not future.done()
        fleet.add()
        assert future.result(timeout=LONG).kind == ""


def test_a_tracker_that_restarts_is_waited_for(fleet, folder):
    fleet.add()
    path = candidate("slow", BOARD, folder)
    with measurer_of(fleet) as measurer:
        assert measurer.submit(path).result(timeout=LONG).kind == ""
        futures = [measurer.submit(path) for _ in range(4)]
        fleet.restart_tracker()
        assert kinds(futures) == [""] * 4


def test_without_boards_a_candidate_is_lost_and_not_failed(fleet, folder):
    board = fleet.add()
    path = candidate("right", BOARD, folder)
    with measurer_of(fleet, patience=2) as measurer:
        assert measurer.submit(path).result(timeout=LONG).kind == ""
        fleet.kill(board)
        begun = time.monotonic()
        outcome = measurer.submit(path).result(timeout=LONG)
        assert outcome.kind == "lost"
        assert fleet.key in outcome.text
        assert time.monotonic() - begun < 60
        fleet.add()
        assert measurer.submit(path).result(timeout=LONG).kind == ""


def test_candidates_do_not_wait_for_boards_one_after_the_other(fleet, folder, capsys):
    """A tuner gives up after three of them: boards that are gone would cost it three times its patience."""
    board = fleet.add()
    path = candidate("right", BOARD, folder)
    with measurer_of(fleet, patience=5) as measurer:
        fleet.kill(board)
        wait_until(lambda: fleet.key not in tracker_summary(*parse_tracker(fleet.address)))
        begun = time.monotonic()
        assert [measurer.submit(path).result(timeout=LONG).kind for _ in range(3)] == ["lost"] * 3
        assert 5 <= time.monotonic() - begun < 12
        fleet.add()
        assert measurer.submit(path).result(timeout=LONG).kind == ""
    said = capsys.readouterr().err.splitlines()
    assert "waiting for a board" in said[0] and said[-1] == "there is a board again"


def test_a_board_that_freezes_costs_no_more_than_its_limit(fleet, folder, monkeypatch):
    monkeypatch.setattr("agq_tvm.tuning.tracker_measurer._MARGIN", 1.0)
    frozen = fleet.add()
    with measurer_of(fleet, timeout=4) as measurer:
        future = measurer.submit(candidate("endless", BOARD, folder))
        wait_until(lambda: "session begins" in Path(frozen.log).read_text().partition("session ended")[2])
        os.killpg(frozen.pid, signal.SIGSTOP)
        fleet.add()
        assert future.result(timeout=LONG).kind == "hung"  # on the other board
        fleet.kill(frozen)


def test_who_is_not_there_is_told_at_once(fleet):
    fleet.add()
    begun = time.monotonic()
    with pytest.raises(AgqError, match=rf"no board 'nobody' at the tracker .*; registered: .*{fleet.key}"):
        TrackerMeasurer(task_for(BOARD), fleet.address, "nobody")
    with pytest.raises(AgqError, match="no tracker answers at 127"):
        TrackerMeasurer(task_for(BOARD), "127.0.0.1:1", fleet.key)
    with pytest.raises(AgqError, match=f"under the key '{fleet.key}' lacks asimddp"):
        TrackerMeasurer(task_for(load_device("snapdragon-870")), fleet.address, fleet.key)
    assert time.monotonic() - begun < 60


def test_one_board_of_another_kind_under_the_key_is_enough_to_refuse(fleet, monkeypatch):
    device = load_device("snapdragon-870")
    fleet.add(device)
    TrackerMeasurer(task_for(device), fleet.address, fleet.key).close()
    fleet.add()
    wrong = fleet.boards[-1]
    monkeypatch.setattr("agq_tvm.tuning.tracker_measurer._checked", {})  # as in the next run of `agq tune`
    port = Path(wrong.log).read_text().split("port ")[1].split()[0]
    with pytest.raises(AgqError, match=rf"board 127\.0\.0\.1:{port} under the key '{fleet.key}' lacks asimddp"):
        TrackerMeasurer(task_for(device), fleet.address, fleet.key)


def test_times_of_emulated_boards_and_of_real_ones_are_kept_apart(fleet, folder, monkeypatch):
    """Neither at the start nor when a board of the other sort comes later, whichever it is."""
    emulated = fleet.add()
    with measurer_of(fleet, patience=1) as measurer:
        launch = processes.launch
        plain = [lambda command, log: launch([word for word in command if word != "--emulated"], log), launch]
        monkeypatch.setattr(processes, "launch", plain[0])
        fleet.add()  # as a real board's server is started
        monkeypatch.setattr(processes, "launch", plain[1])
        monkeypatch.setattr("agq_tvm.tuning.tracker_measurer._checked", {})
        with pytest.raises(AgqError, match=rf"under the key '{fleet.key}' .* is emulated and .* is not.*own"):
            fleet_of(fleet.address, fleet.key, BOARD)
        # A board that was looked at is free again a little later.
        wait_until(lambda: tracker_summary(*parse_tracker(fleet.address))[fleet.key]["free"] == 2)
        looked = {check["name"]: check["state"] for check in look_at_boards(fleet.address, fleet.key, BOARD)}
        assert looked["fleet"] == "wrong"
        fleet.kill(emulated)
        wait_until(lambda: len(tracker_summary(*parse_tracker(fleet.address))[fleet.key]["boards"]) == 1)
        outcome = measurer.submit(candidate("right", BOARD, folder)).result(timeout=LONG)
        assert outcome.kind == "unfit" and "is real and others are emulated" in outcome.text


@pytest.mark.parametrize(("code", "kind"), [("kShutdown", "lost"), ("1", "lost"), ("13", "failed")])
def test_a_connection_that_ends_in_a_call_is_no_verdict(code, kind):
    message = f"Check failed: (code == RPCCode::kReturn) is false: code={code}"
    assert _verdict(RuntimeError(message))["kind"] == kind
