"""Which processes are ours, and which are never touched."""

import dataclasses
import subprocess
import sys

import pytest

from agq_tvm.boards import processes
from agq_tvm.boards.processes import Process


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def sleeper(tmp_path):
    """A process that does nothing, and the child handle of it."""
    log = tmp_path / "log"
    child, started = processes.launch([sys.executable, "-c", "import time; time.sleep(60)"], log)
    yield child, Process("sleeper", "board", "d", "k", "127.0.0.1:1", child.pid, started, str(log))
    if child.poll() is None:
        child.kill()
        child.wait(10)


def test_living_process_is_listed_and_stopped(sleeper):
    _, process = sleeper
    processes.remember(process)
    assert processes.processes() == [process]
    assert processes.free_name("sleeper") == "sleeper-2"
    processes.stop(process)
    assert not process.alive()
    assert processes.processes() == []
    assert processes.free_name("sleeper") == "sleeper"


def test_process_with_a_reused_number_is_not_touched(sleeper):
    child, process = sleeper
    earlier = dataclasses.replace(process, started=process.started - 1)
    processes.remember(earlier)
    assert processes.processes() == []
    processes.stop(earlier)
    assert child.poll() is None
    assert process.alive()


def test_process_that_ignores_the_request_is_ended_by_force(tmp_path):
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
    log = tmp_path / "log"
    child, started = processes.launch([sys.executable, "-c", code], log)
    process = Process("stubborn", "board", "d", "k", "127.0.0.1:1", child.pid, started, str(log))
    while processes.last_line(log) != "ready":
        assert child.poll() is None
    processes.stop(process, patience=0.1)
    assert not process.alive()


def test_children_end_with_their_parent(tmp_path):
    code = "import subprocess; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    log = tmp_path / "log"
    child, started = processes.launch([sys.executable, "-c", code], log)
    while not processes.last_line(log).isdigit():
        assert child.poll() is None
    grandchild = int(processes.last_line(log))
    processes.stop(Process("parent", "board", "d", "k", "127.0.0.1:1", child.pid, started, str(log)))
    assert processes._start_of(grandchild) is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"pid": 1}', '{"name": 1, "kind": "", "pid": "2"}', "not json", '{"extra": 1}']
)
def test_damaged_state_files_are_dropped(text):
    path = processes.state_directory() / "5.json"
    path.write_text(text)
    assert processes.processes() == []
    assert not path.exists()


def test_end_of_a_child_is_seen():
    child = subprocess.Popen(["true"])
    started = processes._start_of(child.pid)
    child.wait(10)
    assert not Process("x", "board", "d", "k", "127.0.0.1:1", child.pid, started or 0, "").alive()


def test_launch_without_a_program(tmp_path):
    with pytest.raises(processes.AgqError, match="cannot start /no/such/program"):
        processes.launch(["/no/such/program"], tmp_path / "log")
