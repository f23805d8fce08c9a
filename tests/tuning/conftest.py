"""Trackers and emulated boards that a test may kill."""

import itertools
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agq_tvm.boards import emulate, processes
from agq_tvm.boards.processes import Process
from agq_tvm.targets import load_device
from tests.boards.conftest import emulator  # noqa: F401

BOARD = load_device("raspberry-pi-4")
_keys = itertools.count()


@dataclass
class Fleet:
    """A tracker, and the boards of a test under a key of its own.

    Attributes
    ----------
    tracker : Process
    boards : list of Process
    key : str
    """

    tracker: Process
    boards: list[Process] = field(default_factory=list)
    key: str = ""

    @property
    def address(self) -> str:
        return self.tracker.tracker

    def add(self, device=BOARD) -> Process:
        self.boards.append(emulate.start_board(device, self.address, self.key))
        return self.boards[-1]

    def restart_tracker(self) -> None:
        """Kill the tracker, and start one at the same port."""
        port = int(self.address.rpartition(":")[2])
        self.kill(self.tracker)
        processes.stop(self.tracker)
        self.tracker = emulate._start_tracker_at(port)

    @staticmethod
    def kill(process: Process) -> None:
        """End a process as a power cut would."""
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def tracker(emulator, tmp_path_factory):  # noqa: F811
    """A tracker; what is started belongs to the module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        try:
            yield Fleet(emulate.start_tracker())
        finally:
            emulate.stop_board("all")


@pytest.fixture
def fleet(tracker):
    """A tracker without boards under `Fleet.key`; those that are added are stopped when the test ends."""
    tracker.key, tracker.boards = f"pi-{next(_keys)}", []
    yield tracker
    for board in tracker.boards:
        processes.stop(board)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where candidates are written."""
    (tmp_path / "candidates").mkdir()
    return tmp_path / "candidates"
