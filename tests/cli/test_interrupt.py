"""Ctrl-C, wherever it arrives."""

import signal
import subprocess
import sys
import threading

import pytest

from agq_tvm import interrupt
from agq_tvm.tuning.tuner import Settings
from tests.tuning.fake_tuning import FakeRunner, tasks, tuner

WITHIN_TVM = """
import os, signal, sys
import tvm_ffi
from agq_tvm.cli import main

pressed = tvm_ffi.convert(lambda: os.kill(os.getpid(), signal.SIGINT))
arguments = type("Arguments", (), {"run": lambda *_: pressed()})
main.build_parser = type("Parser", (), {"parse_args": lambda *_: arguments()})
sys.exit(main.main([]))
"""


def test_an_interrupt_within_a_call_of_tvm_is_none_of_its_errors():
    process = subprocess.run([sys.executable, "-c", WITHIN_TVM], capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stderr) == (130, "agq: interrupted\n")


@pytest.fixture
def watched(monkeypatch):
    """Nothing was pressed before, and what is now is forgotten after the test."""
    monkeypatch.setattr(interrupt, "_asked", threading.Event())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt.watch()
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_that_was_dropped_is_remembered(watched):
    interrupt.check()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()


def test_an_error_is_an_interrupt_only_after_one(watched):
    with pytest.raises(RuntimeError), interrupt.kept():
        raise RuntimeError
    with pytest.raises(KeyboardInterrupt), interrupt.kept():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise RuntimeError from error


def test_who_ignores_interrupts_goes_on_doing_so(watched):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupt.watch()
    signal.raise_signal(signal.SIGINT)
    interrupt.check()


def test_an_interrupt_that_tvm_drops_ends_a_tuner_nevertheless(watched, tmp_path):
    class Dropping(FakeRunner):
        def _one(self, each):
            interrupt._asked.set()  # and no KeyboardInterrupt arrives
            return super()._one(each)

    (task,) = tasks(16)
    made = tuner(tmp_path, [task], Settings(60, "random"))
    made.runner_of = Dropping
    with pytest.raises(KeyboardInterrupt):
        made.run()
    assert len(made.library.read()) < 60
