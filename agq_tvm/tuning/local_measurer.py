"""Measuring on this machine, each candidate in a process that it may take along."""

from agq_tvm.targets.processors import cache_bytes
from agq_tvm.tuning.drift import Drift
from agq_tvm.tuning.measure import CRASHED, HUNG, LOST, Effort
from agq_tvm.tuning.task import Task
from agq_tvm.tuning.worker_measurer import TIMEOUT, WorkerMeasurer
from agq_tvm.tuning.workers import Worker, WorkerEnded, WorkerLate, WorkerUnfit


def effort_here(**settings) -> Effort:
    """Return an `Effort` whose cold operands fill this machine's largest cache twice: its caches may be large."""
    return Effort(cold_bytes=max(Effort.cold_bytes, 2 * cache_bytes()), **settings)


class LocalMeasurer(WorkerMeasurer):
    """Measures on this machine, one candidate at a time; see `WorkerMeasurer`."""

    def __init__(
        self,
        task: Task,
        effort: Effort = Effort(),  # noqa: B008
        timeout: float = TIMEOUT,
        drift: Drift | None = None,
    ) -> None:
        super().__init__(task, effort, timeout, 1, "here", drift)

    def _ask(self, worker: Worker, job: dict) -> dict:
        try:
            return worker.ask(job, job["limit"])
        except WorkerLate:
            return {"kind": HUNG, "text": f"no result within {job['limit']:g} s"}
        except WorkerUnfit as error:
            return {"kind": LOST, "text": str(error)}
        except WorkerEnded as error:
            return {"kind": CRASHED, "text": str(error)}
