"""A tuner whose candidates are neither built nor run: their times are a function of their decisions.

`main` is a program for LIBRARY LOG TRIALS DELAY. Every measurement is a line of LOG.
"""

import json
import os
import sys
import time
from concurrent.futures import Future
from pathlib import Path

from tvm.s_tir.meta_schedule.runner import RunnerResult

from agq_tvm.errors import AgqError
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.kernels.record_library import Library
from agq_tvm.targets import load_device
from agq_tvm.tuning.task import Task, make_task
from agq_tvm.tuning.tuner import Settings, Tuner

DEVICE = "x86-64-avx512vnni"


def tasks(*rows: int, isa: str = "avx512vnni") -> list[Task]:
    device = load_device(DEVICE)
    return [make_task(LinearKernel(each, 64, 256, 4, 32, True, None, False), isa, device, 2) for each in rows]


def landscape(task: Task, decisions: dict[str, int]) -> float:
    """Seconds: least where every decision is in the middle of its choices, rising to both sides."""
    far = 0.0
    for name, values in task.space.choices.items():
        far += abs(values.index(decisions[name]) - len(values) // 2) / len(values)
    return 1e-3 * (1 + far)


class FakeBuilder:
    """Writes the decisions in place of a library."""

    def submit(self, task, decisions, path):
        Path(path).write_text(json.dumps(decisions))
        future: Future = Future()
        future.set_result(None)
        return future

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Done:
    def __init__(self, result, when):
        self._result, self._when = result, when

    def done(self):
        return time.monotonic() >= self._when

    def result(self):
        time.sleep(max(0, self._when - time.monotonic()))
        return self._result


class FakeRunner:
    """Looks up times, a while later; of some candidates it says that they are wrong."""

    def __init__(self, task, log=None, delay=0.0, wrong=lambda decisions: False):
        self.task, self.log, self.delay, self.wrong = task, log, delay, wrong

    def run(self, inputs):
        return [self._one(each) for each in inputs]

    def _one(self, each):
        decisions = json.loads(Path(str(each.artifact_path)).read_text())
        if self.log:
            with open(self.log, "a") as file:
                file.write(json.dumps([self.task.name, decisions]) + "\n")
        if self.wrong(decisions):
            return Done(RunnerResult(None, "wrong: argument 4 differs"), time.monotonic() + self.delay)
        return Done(RunnerResult([landscape(self.task, decisions)] * 3, None), time.monotonic() + self.delay)


class Quiet:
    def update(self, progress):
        pass

    def finish(self, progress):
        pass


def tuner(folder, some_tasks, settings: Settings, log=None, delay=0.0, **runner) -> Tuner:
    library = Library(folder, device=DEVICE)
    return Tuner(
        library, some_tasks, lambda task: FakeRunner(task, log, delay, **runner), settings, Quiet(), FakeBuilder
    )


def main() -> int:
    folder, log, trials, delay = sys.argv[1:]
    settings = Settings(int(trials), strategy="random", batch=4, seed=os.getpid())
    try:
        tuner(folder, tasks(16, 32), settings, log, float(delay)).run()
    except AgqError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
