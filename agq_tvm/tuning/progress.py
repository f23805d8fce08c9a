"""Where each task is while it is tuned, for whoever shows it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from agq_tvm.tuning.task import Task  # which loads TVM: what only shows results need not wait for it


@dataclass
class Progress:
    """Where a task is.

    Attributes
    ----------
    task : Task
    wanted : int
        Trials that the library shall have of it.
    known, failures : int
        Trials that it has, and those of them that failed.
    measured : int
        Those of this run.
    best, default : float or None
        Seconds of a call: the fastest's, and the hand-made schedule's.
    time_left : float or None
        Seconds until all tasks are done, as far as one can tell.
    """

    task: "Task"
    wanted: int
    known: int = 0
    failures: int = 0
    measured: int = 0
    best: float | None = None
    default: float | None = None
    time_left: float | None = None

    @property
    def missing(self) -> int:
        """Trials that are to be made."""
        return max(0, self.wanted - self.known)


class Display(Protocol):
    """Shows what happens."""

    def update(self, progress: Progress) -> None:
        """Show where a task is."""

    def finish(self, progress: Progress) -> None:
        """Show where a task was left."""
