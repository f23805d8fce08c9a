"""What boards tell of themselves, and of whom they serve."""

import time

import pytest

from agq_tvm.boards.fleet import Fleet, check_fleet
from agq_tvm.boards.status import board_status, unfit
from agq_tvm.boards.tracker import parse_tracker, tracker_summary
from agq_tvm.errors import AgqError
from agq_tvm.targets import load_device

pytestmark = pytest.mark.emulator


def test_status(boards):
    with boards.session("raspberry-pi-4") as session:
        status = board_status(session)
    assert abs(status["time"] - time.time()) < 60
    assert 0 < status["memory_free_bytes"] < status["memory_bytes"]
    assert 0 < status["disk_free_bytes"] < status["disk_bytes"]
    assert status["load"] >= 0
    assert all(value > 0 for value in status.get("kilohertz", {}).values())


def test_a_server_that_cannot_tell():
    class Session:
        def get_function(self, name):
            raise AttributeError(name)

    assert board_status(Session()) is None
    assert unfit(Session(), load_device("raspberry-pi-4")) is None


def test_the_tracker_tells_whom_a_board_serves(boards):
    def busy() -> list:
        return tracker_summary(*parse_tracker(boards.tracker))["raspberry-pi-4"]["busy"]

    with boards.session("raspberry-pi-4") as session:
        (told,) = busy()
        assert "@" in told["user"]
        assert abs(told["since"] - time.time()) < 60
        assert f"{told['board'][0]}:{told['board'][1]}" == session.board
    deadline = time.monotonic() + 60
    while busy() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert busy() == []


def test_boards_are_checked_before_they_are_used(boards):
    assert check_fleet(boards.tracker, "raspberry-pi-4", load_device("raspberry-pi-4")) == Fleet(1, True)
    with pytest.raises(
        AgqError, match=r"under the key 'raspberry-pi-4' lacks asimddp.*, which code for snapdragon-870"
    ):
        check_fleet(boards.tracker, "raspberry-pi-4", load_device("snapdragon-870"))
    with pytest.raises(AgqError, match="is a board of another architecture: code for x86-64-avx2 does not run there"):
        check_fleet(boards.tracker, "raspberry-pi-4", load_device("x86-64-avx2"))
    with pytest.raises(AgqError, match=r"no board 'pi' at the tracker .*; registered: raspberry-pi-4"):
        check_fleet(boards.tracker, "pi", load_device("raspberry-pi-4"))
    # What was refused was given back.
    assert check_fleet(boards.tracker, "raspberry-pi-4", load_device("raspberry-pi-4")) == Fleet(1, True)
