"""`agq tune` as it is typed, over a tracker and boards that do not stay."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agq_tvm.kernels.record import Record
from agq_tvm.kernels.record_library import Library

pytestmark = pytest.mark.emulator

TRIALS = 8
LONG = 400


@pytest.fixture
def tune(tiny_checkpoint, tmp_path):
    """Start `agq tune` with a library of its own; it is ended with the test."""
    running = []

    def start(tracker: str, key: str) -> subprocess.Popen:
        words = [sys.executable, "-m", "agq_tvm", "tune", str(tiny_checkpoint), "--target", "raspberry-pi-4"]
        words += ["--tracker", tracker, "--key", key, "--library", str(tmp_path / "library"), "--strategy", "random"]
        words += ["--trials", str(TRIALS), "--only", "linear_w4a8g64_group_asym_m1_n96_k160"]
        running.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return running[-1]

    yield start
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)


def records(tmp_path: Path) -> list[Record]:
    return Library(tmp_path / "library", device="raspberry-pi-4").read()


def wait_for_records(process, tmp_path: Path, count: int) -> None:
    deadline = time.monotonic() + LONG
    while len(records(tmp_path)) < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_nothing_is_lost_or_doubled_when_tracker_and_boards_go(fleet, tune, tmp_path):
    first = fleet.add()
    process = tune(fleet.address, fleet.key)
    wait_for_records(process, tmp_path, 2)
    fleet.kill(first)  # and with it all boards are gone
    time.sleep(1)
    fleet.restart_tracker()
    assert process.poll() is None
    fleet.add()
    _, told = process.communicate(timeout=LONG)
    assert process.returncode == 0, told
    found = records(tmp_path)
    assert len(found) == TRIALS
    assert [record.error for record in found] == [None] * TRIALS
    assert len({record.key for record in found}) == TRIALS


def test_what_cannot_begin_ends_with_a_sentence(fleet, tune, tmp_path):
    fleet.add()
    for tracker, key, sentence in (
        ("127.0.0.1:1", fleet.key, "no tracker answers at 127.0.0.1:1"),
        (fleet.address, "nobody", "no board 'nobody' at the tracker"),
    ):
        process = tune(tracker, key)
        _, told = process.communicate(timeout=LONG)
        assert process.returncode == 2
        assert told.strip().splitlines()[-1].startswith(f"agq: {sentence}")
    assert records(tmp_path) == []


def test_ctrl_c_leaves_no_process(fleet, tune, tmp_path):
    fleet.add()
    process = tune(fleet.address, fleet.key)
    wait_for_records(process, tmp_path, 1)
    workers = [int(word) for word in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert told.strip().splitlines()[-1].startswith("agq: interrupted")
    deadline = time.monotonic() + 30
    while living := [pid for pid in workers if os.path.exists(f"/proc/{pid}")]:
        assert time.monotonic() < deadline, living
        time.sleep(0.05)
