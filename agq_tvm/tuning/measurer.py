"""What the runners for this machine and for boards have in common: libraries go in, verdicts come out."""

import tempfile
import threading
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from agq_tvm.errors import AgqError
from agq_tvm.tuning.candidate import export_candidate, make_candidate
from agq_tvm.tuning.drift import Drift
from agq_tvm.tuning.measure import ONCE, Argument, Effort, Measurement
from agq_tvm.tuning.reference import arguments_of, is_exact
from agq_tvm.tuning.task import Task
from agq_tvm.tuning.workers import Worker, borrow, give_back

TIMEOUT = 30.0
"""Seconds that a candidate may take on a board, its transfer and its check included."""


@dataclass(frozen=True)
class Outcome:
    """What came of a candidate: a measurement, or an error.

    Attributes
    ----------
    measurement : Measurement or None
    kind, text : str
        Of the error, see `agq_tvm.tuning.measure.MeasureError`; empty if there is none.
    """

    measurement: Measurement | None = None
    kind: str = ""
    text: str = ""

    @property
    def message(self) -> str | None:
        """The error as a runner says it, None if there is none."""
        return f"{self.kind}: {self.text}" if self.kind else None


class Measurer(ABC):
    """Measures candidates of one task.

    Parameters
    ----------
    task : Task
    effort : Effort
    timeout : float
        Seconds for a candidate, `Effort.cooldown` not counted.
    parallel : int
        Candidates that are measured at the same time.
    worker : str
        Kind of the worker processes.
    """

    def __init__(self, task: Task, effort: Effort, timeout: float, parallel: int, worker: str) -> None:
        self.task, self.effort, self.timeout = task, effort, timeout
        self.drift = Drift()
        self._workers = [borrow(worker) for _ in range(parallel)]
        self._free = list(self._workers)
        self._closed = threading.Event()
        self._executor = ThreadPoolExecutor(parallel, thread_name_prefix="measure")
        self._scratch = tempfile.TemporaryDirectory(prefix="agq-measure-")
        self._arguments: list[Argument] | None = None

    def submit(self, path: str) -> "Future[Outcome]":
        """Have a candidate's library measured; its future never raises but for mistakes of ours."""
        self.arguments()
        return self._executor.submit(self._measure, str(path))

    def close(self) -> None:
        """Stop measuring; what is being measured fails."""
        self._closed.set()
        self._executor.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            if worker not in self._free:
                worker.kill()
        self._executor.shutdown()
        for worker in self._workers:
            give_back(worker)
        self._workers.clear()
        self._scratch.cleanup()

    def __enter__(self) -> "Measurer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def arguments(self) -> list[Argument]:
        """Return the kernel's arguments with what it must write: the hand-made kernel's results, or numpy's.

        Raises
        ------
        AgqError
            If the hand-made kernel cannot be run.
        """
        if self._arguments is None:
            arguments = arguments_of(self.task)
            written = [place for place, argument in enumerate(arguments) if argument.written]
            if any(arguments[place].digest is None for place in written):
                arguments = self._by_default(arguments, written)
            self._arguments = arguments
        return self._arguments

    @abstractmethod
    def _ask(self, worker: Worker, job: dict) -> dict:
        """Let a worker do a job; return its answer, with ``kind`` and ``text`` for an error."""

    def _measure(self, path: str) -> Outcome:
        answer = self._answer(self._job(path, self.effort, self.arguments()))
        if "measurement" not in answer:
            return Outcome(kind=answer["kind"], text=answer["text"])
        measurement = Measurement(**answer["measurement"])
        self.drift.note(measurement.board, answer["fixed"])
        return Outcome(measurement)

    def _answer(self, job: dict) -> dict:
        worker = self._free.pop()  # there are as many as threads
        try:
            return self._ask(worker, job | {"fixed": self.drift.best()})
        finally:
            self._free.append(worker)

    def _job(self, path: str, effort: Effort, arguments: list[Argument]) -> dict:
        listed, limit = [asdict(argument) for argument in arguments], self.timeout + effort.cooldown
        return {
            "path": path,
            "arguments": listed,
            "threads": self.task.threads,
            "effort": asdict(effort),
            "limit": limit,
        }

    def _by_default(self, arguments: list[Argument], written: list[int]) -> list[Argument]:
        """Run the hand-made kernel once and take what it writes as the reference."""
        path = Path(self._scratch.name) / "default.so"
        export_candidate(make_candidate(self.task, None), self.task.device, path)
        files = {place: Path(self._scratch.name) / f"reference-{place}.npy" for place in written}
        job = self._job(str(path), ONCE, arguments) | {"save": {place: str(file) for place, file in files.items()}}
        answer = self._answer(job)
        if "saved" not in answer:
            raise AgqError(
                f"{self.task.name}: the hand-made kernel was not measured ({answer['kind']}: {answer['text']})"
            )
        if not is_exact(self.task):
            return arguments_of(self.task, {}, files)
        return arguments_of(self.task, {place: _digest_of(file) for place, file in files.items()})


def _digest_of(file: Path) -> int:
    import numpy as np

    from agq_tvm.tuning.operands import digest

    return digest(np.load(file))
