"""Threads of an engine: where they run, and what they leave alone. In a process of its own, with a pool of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import agq_tvm.boards
from agq_tvm.runtime.threads import SPINS, configure_board, pool_arguments
from agq_tvm.targets.processors import Processor

_PROBE = """
import json, os, subprocess, sys, threading, time
from agq_tvm.runtime.bundle import Bundle
from agq_tvm.runtime.engine import Engine, LocalSession
from agq_tvm.runtime.threads import Threads

def tasks():
    found = {}
    for task in os.listdir("/proc/self/task"):
        status = open(f"/proc/self/task/{task}/status").read()
        found[task] = status.split("Cpus_allowed_list:")[1].split()[0]
    return found

def decode(count):
    for token in range(count):
        engine.decode(token)

before, bundle = tasks(), Bundle(sys.argv[1])
engine = Engine(bundle, LocalSession(bundle, threads=2))
decode(8)
workers = sorted(where for task, where in tasks().items() if task not in before)
with Threads(2).running():
    caller = sorted(os.sched_getaffinity(0))
start = time.process_time()
time.sleep(0.5)
idle = time.process_time() - start
child = subprocess.check_output([sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)))"])
logits = engine.decode(1)
engine.reset()
one = Engine(bundle, LocalSession(bundle, threads=1))
decode(8)
same, other = bool((engine.decode(1) == logits).all()), []
thread = threading.Thread(target=lambda: other.append((decode(2), sorted(os.sched_getaffinity(0)))[1]))
thread.start()
thread.join()
print(json.dumps({
    "workers": workers,
    "caller": caller,
    "idle": idle,
    "after": sorted(os.sched_getaffinity(0)),
    "child": json.loads(child),
    "same": same,
    "other_thread": other[0],
    "counts": [engine.session.threads, one.session.threads, LocalSession(bundle, threads=10000).threads],
}))
"""
ALLOWED = sorted(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def facts(tiny_bundle) -> dict:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TVM_")}
    command = [sys.executable, "-c", _PROBE, str(tiny_bundle)]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)


def test_caller_and_children_may_run_where_they_could(facts):
    assert facts["after"] == facts["child"] == facts["other_thread"] == ALLOWED


@pytest.mark.skipif(len(ALLOWED) != 2, reason="shows best where two threads take all processors")
def test_threads_have_a_processor_each(facts):
    assert facts["caller"] == ALLOWED[:1]
    assert str(ALLOWED[1]) in facts["workers"]


def test_an_idle_engine_takes_no_time(facts):
    assert facts["idle"] < 0.02  # TVM's own threads look for work for 0.1 s


def test_another_engine_does_not_disturb(facts):
    assert facts["same"]


def test_there_are_no_more_threads_than_processors(facts):
    assert facts["counts"][1:] == [1, facts["counts"][2]] and facts["counts"][2] <= len(ALLOWED)


def machine(*speeds: int) -> list[Processor]:
    return [Processor(number, speed, 0) for number, speed in enumerate(speeds)]


def test_threads_that_take_all_of_a_kind_get_one_processor_each():
    assert pool_arguments(machine(9, 9, 2, 2), 2) == (-2, 2, ["0", "1", "2", "3"])
    assert pool_arguments(machine(9, 9, 2, 2), 4) == (-2, 4, ["0", "1", "2", "3"])


def test_fewer_threads_share_a_kind():
    assert pool_arguments(machine(9, 9, 2, 2), 1) == (-3, 1, ["0", "1"])
    assert pool_arguments(machine(9, 9, 2, 2), 3) == (-3, 3, ["0", "1", "2", "3"])
    assert pool_arguments(machine(9, 2), 1) == (-3, 1, ["0"])


def test_a_board_without_our_server_takes_tvms_own_choice():
    calls = []

    def get_function(name):
        if name.startswith("agq."):
            raise AttributeError(name)
        return lambda *arguments: calls.append((name, arguments))

    configure_board(get_function, 4)
    assert calls == [("runtime.config_threadpool", (1, 4))]


def test_a_board_of_ours_is_told_its_processors():
    calls = []
    functions = {
        "agq.board.processors": lambda: "0 250 0 0\n1 250 0 1\n2 1024 0 2\n3 1024 0 3",
        "agq.board.use_threads": lambda *arguments: calls.append(arguments),
    }
    configure_board(functions.__getitem__, 2)
    assert calls == [(-3, 4, "2 3 0 1"), (-2, 2, "2 3 0 1")]
    configure_board(functions.__getitem__, 8)
    assert calls[-1][1] == 4


def test_threads_of_boards_look_for_work_as_often():
    server = Path(agq_tvm.boards.__file__).parent / "server" / "session.c"
    assert re.findall(r'#define SPINS "(\d+)"', server.read_text()) == [str(SPINS)]
