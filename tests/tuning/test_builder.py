"""Candidates are built in processes of their own, to which tasks travel as plain values."""

import contextlib
import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from agq_tvm.errors import AgqError
from agq_tvm.flow.tasks import extract_tasks
from agq_tvm.kernels.norm import LayerNormKernel
from agq_tvm.targets import load_device
from agq_tvm.tuning.builder import Builder, plain, task_of
from agq_tvm.tuning.task import make_task
from agq_tvm.tuning.workers import Worker, WorkerEnded


@pytest.mark.parametrize("cache", ["float16", "int8"])
@pytest.mark.parametrize("device", ["x86-64-avx512vnni", "raspberry-pi-4"])
def test_a_task_is_the_same_after_json(tiny_checkpoint, device, cache):
    for task in extract_tasks(tiny_checkpoint, load_device(device), 64, cache):
        made = task_of(json.loads(json.dumps(plain(task))))
        assert made == replace(task, name="", count=made.count, macs=0, bytes=0, cold_bytes=0)


def test_whatever_becomes_of_a_build_the_next_is_made(tmp_path, monkeypatch):
    device = load_device("host")
    task = make_task(LayerNormKernel(16, 64, 1e-5), device.instruction_set, device, 1)
    path, ask = tmp_path / "candidate.so", Worker.ask
    with Builder(1) as builder:
        assert "not built: " in builder.submit(task, {"nonsense": 1}, path).result(300)
        monkeypatch.setattr(Worker, "ask", lambda worker, job, limit: ask(worker, job, 0.0))
        assert builder.submit(task, task.space.default, path).result(300) == "not built: no library within 300 s"
        assert not path.exists()
        monkeypatch.setattr(Worker, "ask", ask)
        assert builder.submit(task, task.space.default, path).result(300) is None
    assert path.stat().st_size > 0


def test_a_build_that_was_killed_is_made_once_more(tmp_path, monkeypatch):
    """A machine that is out of memory ends the largest process, and that is no candidate's fault."""
    device = load_device("host")
    task = make_task(LayerNormKernel(16, 64, 1e-5), device.instruction_set, device, 1)
    path, ask, asked = tmp_path / "candidate.so", Worker.ask, []

    def killed_once(worker, job, limit):
        asked.append(job)
        if len(asked) == 1:
            raise WorkerEnded("its process was ended by signal 9 (Killed)", killed=True)
        return ask(worker, job, limit)

    monkeypatch.setattr(Worker, "ask", killed_once)
    with Builder(1) as builder:
        assert builder.submit(task, task.space.default, path).result(300) is None
    assert len(asked) == 2 and path.stat().st_size > 0


def test_no_process_to_build_in_ends_the_tuning(tmp_path, monkeypatch):
    device = load_device("host")
    task = make_task(LayerNormKernel(16, 64, 1e-5), device.instruction_set, device, 1)
    monkeypatch.setattr("sys.executable", "false")
    with Builder(1) as builder, pytest.raises(AgqError, match="cannot be started: its process ended with code 1"):
        builder.submit(task, task.space.default, tmp_path / "candidate.so").result(60)


def test_what_a_worker_started_ends_with_it():
    worker, script = Worker("build"), "sleep 300 & echo $!; wait"
    worker._process = subprocess.Popen(
        ["sh", "-c", script], stdout=subprocess.PIPE, stdin=subprocess.PIPE, start_new_session=True
    )
    child = int(worker._process.stdout.readline())
    assert _runs(child)
    worker.close()
    deadline = time.monotonic() + 30
    while _runs(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _runs(process: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    return False
