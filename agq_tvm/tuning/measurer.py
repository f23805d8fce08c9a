"""What measures candidates, wherever that is: libraries go in, verdicts come out."""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agq_tvm.files import write_error
from agq_tvm.tuning.candidate import export_candidate, make_candidate
from agq_tvm.tuning.measure import Argument, Measurement
from agq_tvm.tuning.operands import digest
from agq_tvm.tuning.reference import arguments_of, is_exact
from agq_tvm.tuning.task import Task


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
    """Measures candidates of one task: checks what they compute, then says how long a call takes.

    Parameters
    ----------
    task : Task
    timeout : float
        Seconds for a candidate.
    parallel : int
        Candidates that are measured at the same time.
    """

    def __init__(self, task: Task, timeout: float, parallel: int) -> None:
        self.task, self.timeout = task, timeout
        self._executor = ThreadPoolExecutor(parallel, thread_name_prefix="measure")
        self._scratch = tempfile.TemporaryDirectory(prefix="agq-measure-")
        self._arguments: list[Argument] | None = None

    def submit(self, path: str) -> "Future[Outcome]":
        """Have a candidate's library measured; its future never raises but for mistakes of ours."""
        self.arguments()
        return self._executor.submit(self._measure, str(path))

    def close(self) -> None:
        """Stop measuring; what waits is not measured any more."""
        self._executor.shutdown(cancel_futures=True)
        self._scratch.cleanup()

    def __enter__(self) -> "Measurer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def arguments(self) -> list[Argument]:
        """Return the kernel's arguments with what it must write: numpy's results, or those of the hand-made kernel.

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

    def _by_default(self, arguments: list[Argument], written: list[int]) -> list[Argument]:
        """Run the hand-made kernel once and take what it writes as the reference."""
        folder = Path(self._scratch.name)
        try:
            export_candidate(make_candidate(self.task, None), self.task.device, folder / "default.so")
        except OSError as error:
            raise write_error(error, folder) from error
        files = {place: folder / f"reference-{place}.npy" for place in written}
        self._save(str(folder / "default.so"), arguments, files)
        if not is_exact(self.task):
            return arguments_of(self.task, {}, files)
        return arguments_of(self.task, {place: digest(np.load(file)) for place, file in files.items()})

    @abstractmethod
    def _measure(self, path: str) -> Outcome:
        """Measure a candidate's library; called in a thread."""

    @abstractmethod
    def _save(self, path: str, arguments: list[Argument], files: Mapping[int, Path]) -> None:
        """Run a library once and save what it wrote (.npy), by place among its arguments.

        Raises
        ------
        AgqError
            If it does not run.
        """
