"""What measuring on this machine and on boards have in common: each candidate is run by a worker process."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from agq_tvm.errors import AgqError
from agq_tvm.tuning.drift import Drift
from agq_tvm.tuning.measure import LOST, ONCE, Argument, Effort, Measurement
from agq_tvm.tuning.measurer import Measurer, Outcome
from agq_tvm.tuning.task import Task
from agq_tvm.tuning.workers import Crew, Worker, WorkerEnded, borrow, give_back

TIMEOUT = 30.0
"""Seconds that a candidate may take on a board, its transfer and its check included."""


class WorkerMeasurer(Measurer):
    """Measures candidates of one task in worker processes.

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
    drift : Drift, optional
        That of the tasks before.

    Attributes
    ----------
    crew : Crew
        The worker processes.
    drift : Drift
        How fast the processors were that measured.
    """

    def __init__(
        self, task: Task, effort: Effort, timeout: float, parallel: int, worker: str, drift: Drift | None = None
    ) -> None:
        super().__init__(task, timeout, parallel)
        self.effort, self.drift = effort, drift or Drift()
        self.crew = Crew([borrow(worker) for _ in range(parallel)])

    def close(self) -> None:
        """Stop measuring; what is being measured fails."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self.crew.stop()
        super().close()
        for worker in self.crew.workers:
            give_back(worker)
        self.crew.workers.clear()

    @abstractmethod
    def _ask(self, worker: Worker, job: dict) -> dict:
        """Let a worker do a job; return its answer, with ``kind`` and ``text`` for an error."""

    def _measure(self, path: str) -> Outcome:
        answer = self._answer(self._job(path, self.effort, self.arguments()))
        if "measurement" not in answer:
            return Outcome(kind=answer["kind"], text=answer["text"])
        measurement = Measurement(**answer["measurement"])
        self.drift.note(measurement.board, answer["fixed"], measurement.hot)
        return Outcome(measurement)

    def _answer(self, job: dict) -> dict:
        try:
            with self.crew.one() as worker:
                return self._ask(worker, job | {"fixed": self.drift.best(), "slow": self.drift.slow()})
        except WorkerEnded as error:  # before it was asked
            return {"kind": LOST, "text": str(error)}

    def _job(self, path: str, effort: Effort, arguments: list[Argument]) -> dict:
        return {
            "path": path,
            "arguments": [asdict(argument) for argument in arguments],
            "threads": self.task.threads,
            "effort": asdict(effort),
            "limit": self.timeout + effort.cooldown,
        }

    def _save(self, path: str, arguments: list[Argument], files: Mapping[int, Path]) -> None:
        job = self._job(path, ONCE, arguments) | {"save": {place: str(file) for place, file in files.items()}}
        answer = self._answer(job)
        if "saved" not in answer:
            raise AgqError(
                f"{self.task.name}: the hand-made kernel was not measured ({answer['kind']}: {answer['text']})"
            )
