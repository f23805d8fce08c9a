"""MetaSchedule's view of a `Measurer`."""

from concurrent.futures import Future

from tvm.ir.utils import derived_object
from tvm.s_tir.meta_schedule.runner import PyRunner, PyRunnerFuture, RunnerResult

from agq_tvm.tuning.measurer import Measurer, Outcome


@derived_object
class MeasuringFuture(PyRunnerFuture):
    """What comes of a candidate."""

    def __init__(self, future: "Future[Outcome]") -> None:
        super().__init__()
        self._future = future

    def done(self) -> bool:
        """Whether it is known."""
        return self._future.done()

    def result(self) -> RunnerResult:
        """Wait for it. Seconds without outliers; an error begins with its kind, see `measure.MeasureError`."""
        outcome = self._future.result()
        measured = outcome.measurement
        return RunnerResult(measured.kept if measured else None, outcome.message)


@derived_object
class MeasuringRunner(PyRunner):
    """Measures what MetaSchedule has built.

    Parameters
    ----------
    measurer : Measurer
        To be closed by whoever made the runner, with `close`.

    Attributes
    ----------
    outcomes : dict of str to Future of Outcome
        By the path of the candidate's library: all that is known, where MetaSchedule keeps only seconds.
    """

    def __init__(self, measurer: Measurer) -> None:
        super().__init__()
        self.measurer = measurer
        self.outcomes: dict[str, Future[Outcome]] = {}

    def run(self, runner_inputs: list) -> list:
        """Measure candidates; see `MeasuringFuture`."""
        futures = []
        for each in runner_inputs:
            path = str(each.artifact_path)
            self.outcomes[path] = self.measurer.submit(path)
            futures.append(MeasuringFuture(self.outcomes[path]))
        return futures

    def close(self) -> None:
        """End what measures."""
        self.measurer.close()
