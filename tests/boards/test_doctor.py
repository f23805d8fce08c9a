"""`agq doctor` and `agq tracker` against real trackers and boards."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from importlib import metadata

import pytest

from agq_tvm.boards.tracker import parse_tracker, tracker_summary
from agq_tvm.cli.main import main
from agq_tvm.errors import AgqError
from agq_tvm.flow import doctor, doctor_boards
from agq_tvm.targets import load_device


def states(checks) -> dict[str, str]:
    return {re.sub(r"^\S+:\d+ ", "", check["name"]): check["state"] for check in checks}


def looked_at(*arguments) -> list[dict]:
    return list(doctor_boards.look_at_boards(*arguments))


@pytest.mark.emulator
def test_all_is_well_with_a_board(boards, capsys):
    assert main(["doctor", "--tracker", boards.tracker, "--key", "raspberry-pi-4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    expected = ["tracker", "boards", "processor", "kernel", "clock", "memory", "disk"]
    assert [name for name in expected if states(found["checks"]).get(name) != "ok"] == []
    kernel = next(check for check in found["checks"] if check["name"].endswith(" kernel"))
    assert kernel["found"].startswith("a neon kernel went there and back in ")


@pytest.mark.emulator
def test_what_is_wrong_with_boards_is_said(boards):
    (*_, processor) = looked_at(boards.tracker, "raspberry-pi-4", load_device("snapdragon-870"))
    assert processor["state"] == "wrong"
    assert "lacks asimddp" in processor["found"]
    assert processor["advice"] == "compile with --target raspberry-pi-4, or use another board"
    (*_, key) = looked_at(boards.tracker, "nobody", None)
    assert (key["name"], key["state"]) == ("key", "wrong")
    with boards.session("raspberry-pi-4") as session:
        (*_, busy) = looked_at(boards.tracker, "raspberry-pi-4", None)
        assert busy["state"] == "wrong"
        assert re.match(rf"1 registered, 0 free; {session.board} serves \S+@\S+ for \d+ s", busy["found"])


@pytest.mark.emulator
def test_an_unknown_key_of_a_known_board_is_looked_at_for_what_it_can_do(boards):
    found = looked_at(boards.tracker, "snapdragon-870", None)
    processor = next(check for check in found if check["name"].endswith(" processor"))
    assert processor["found"] == "can run code for raspberry-pi-5"
    assert states(found)["kernel"] == "ok"


@pytest.mark.emulator
def test_a_board_in_a_bad_state(boards, monkeypatch):
    bad = {"time": 0.0, "memory_bytes": 1 << 30, "memory_free_bytes": 1, "disk_bytes": 1 << 30, "disk_free_bytes": 1}
    bad |= {"millidegrees": {"cpu-0": 91_000, "gpu-1": 40_000}, "kilohertz": {"0": 600_000, "1": 1_800_000}}
    monkeypatch.setattr(doctor_boards, "board_status", lambda session: bad)
    found = looked_at(boards.tracker, "raspberry-pi-4", load_device("raspberry-pi-4"))
    wrong = {check["name"].split()[-1]: check["found"] for check in found if check["state"] == "wrong"}
    assert wrong.keys() == {"clock", "memory", "disk", "temperature"}
    assert wrong["temperature"] == "91 °C (cpu-0)"
    assert all(check["advice"] for check in found if check["state"] == "wrong")


def test_no_tracker_is_told_in_a_sentence_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_kernel_here", lambda device: "left out")
    assert main(["doctor", "--tracker", "127.0.0.1:1"]) == 2
    shown = capsys.readouterr().out
    assert "wrong   tracker: no tracker answers at 127.0.0.1:1" in shown
    assert "do: start one with `agq tracker`" in shown
    assert shown.endswith("1 of 7 is wrong\n")


def test_a_pair_that_crashes_is_found(monkeypatch):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1.15" if name == "apache-tvm-ffi" else real(name))
    check = doctor._versions()
    assert check.state == "wrong"
    assert check.advice.startswith("pip install apache-tvm-ffi==")


def test_a_kernel_that_does_not_run_here_is_wrong_and_not_the_end():
    def look():
        raise AgqError("a kernel crashed")

    assert doctor._try("kernel here", look, "advice") == doctor.Check(
        "kernel here", "wrong", "a kernel crashed", "advice"
    )


@pytest.fixture
def command(tmp_path):
    """Start `agq tracker` and give its process; it is ended with the test."""
    running = []

    def start(*arguments: str) -> subprocess.Popen:
        environment = os.environ | {"XDG_STATE_HOME": str(tmp_path)}
        words = [sys.executable, "-m", "agq_tvm", "tracker", *arguments]
        process = subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def test_tracker_runs_until_it_is_told_to_end(command):
    process = command("--port", "0")
    address = process.stdout.readline().split()[-1]
    assert tracker_summary(*parse_tracker(address)) == {}
    process.send_signal(signal.SIGTERM)
    _, warnings = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "WARNING" not in warnings
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            tracker_summary(*parse_tracker(address), timeout=1)
        except AgqError:
            return
    pytest.fail("the tracker lives on")


def test_tracker_warns_where_others_reach_it_and_says_when_the_port_is_taken(command):
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        process = command("--host", "0.0.0.0", "--port", str(port))
        _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"WARNING: whoever reaches 0.0.0.0:{port} runs code" in told
    assert f"cannot listen on 0.0.0.0:{port}: another program does" in told
    process = command("--host", "0.0.0.0", "--port", "0")
    port = process.stdout.readline().split(":")[-1].strip()  # here it is reached at 127.0.0.1, from boards it is not
    assert f"--tracker ADDRESS:{port}, ADDRESS being this machine's" in process.stdout.readline()
