"""Building candidates in processes of their own, apart from measuring: LLVM may end the process that it runs in."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from agq_tvm.errors import AgqError
from agq_tvm.kernels import tunable
from agq_tvm.kernels.attrs import describe
from agq_tvm.kernels.instruction_sets import instruction_set
from agq_tvm.targets import Device
from agq_tvm.targets.device import Cluster
from agq_tvm.tuning.task import Task
from agq_tvm.tuning.workers import Crew, Worker, WorkerEnded, WorkerLate, WorkerUnfit

TIMEOUT = 300.0
"""Seconds for a candidate; linking for a board for the first time takes a minute."""


class Builder:
    """Builds candidates in parallel.

    Parameters
    ----------
    parallel : int, optional
        Processes; by default as many as this one may use processors.
    timeout : float
        Seconds for a candidate.
    """

    def __init__(self, parallel: int | None = None, timeout: float = TIMEOUT):
        parallel = parallel or len(os.sched_getaffinity(0))
        self._timeout = timeout
        self._crew = Crew([Worker("build") for _ in range(parallel)])
        self._executor = ThreadPoolExecutor(parallel, thread_name_prefix="build")

    def submit(self, task: Task, decisions: dict[str, int], path: Path) -> "Future[str | None]":
        """Have a candidate built into a library; its future is None, or says why that failed.

        It raises AgqError if no process can build.
        """
        return self._executor.submit(self._build, task, decisions, path)

    def close(self) -> None:
        """End the processes; what is being built fails."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._crew.stop()
        self._executor.shutdown()
        for worker in self._crew.workers:
            worker.close()

    def __enter__(self) -> "Builder":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _build(self, task: Task, decisions: dict[str, int], path: Path) -> str | None:
        job = plain(task) | {"decisions": decisions, "path": str(path), "limit": self._timeout}
        try:
            answer = self._ask(job)
        except WorkerUnfit as error:
            raise AgqError(str(error)) from None
        except WorkerLate:
            return f"not built: no library within {self._timeout:g} s"
        except WorkerEnded as error:
            return f"not built: {error}"
        return None if "built" in answer else f"not built: {answer['text']}"

    def _ask(self, job: dict) -> dict:
        """Have a worker build; once more if its process was killed, by a machine that is out of memory perhaps."""
        try:
            with self._crew.one() as worker:
                return worker.ask(job, self._timeout)
        except WorkerEnded as error:
            if self._crew.stopped or not error.killed:
                raise
        with self._crew.one() as worker:
            return worker.ask(job, self._timeout)


def plain(task: Task) -> dict:
    """Return what building needs to know of a task, as JSON can hold it."""
    return {"kernel": describe(task.kernel), "isa": task.isa, "device": asdict(task.device), "threads": task.threads}


def task_of(job: dict) -> Task:
    """Return the task that `plain` wrote down, without its name and counts."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in job["device"].items()}
    device = Device(**fields | {"clusters": tuple(Cluster(**cluster) for cluster in fields["clusters"])})
    kernel = tunable.described(job["kernel"], instruction_set(job["isa"]))
    return Task("", kernel, job["isa"], device, job["threads"])


def build_job(job: dict) -> dict:
    """Build a candidate, in a worker: a task by `plain`, ``decisions``, and ``path`` for the library."""
    from agq_tvm.tuning.candidate import export_candidate, make_candidate

    task = task_of(job)
    export_candidate(make_candidate(task, job["decisions"]), task.device, job["path"])
    return {"built": job["path"]}
