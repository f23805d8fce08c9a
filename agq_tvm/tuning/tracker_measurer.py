"""Measuring on boards behind a tracker, as many at a time as are registered under a key.

The tracker is the queue: each worker process asks it for a board, measures one candidate, and gives the board back.
"""

import contextlib
import threading
import time
from dataclasses import asdict, replace

from agq_tvm.boards.fleet import Fleet, check_fleet
from agq_tvm.boards.tracker import parse_tracker, tracker_summary
from agq_tvm.errors import AgqError
from agq_tvm.progress import say
from agq_tvm.targets import Device
from agq_tvm.tuning.drift import Drift
from agq_tvm.tuning.measure import CRASHED, LOST, NO_VERDICT, UNFIT, Effort
from agq_tvm.tuning.task import Task
from agq_tvm.tuning.worker_measurer import TIMEOUT, WorkerMeasurer
from agq_tvm.tuning.workers import Worker, WorkerEnded, WorkerLate

PATIENCE = 600.0
"""Seconds for which boards that went away are waited for."""
_LOSSES = 3
"""Boards that a candidate may lose before it is taken for the reason."""
_PAUSE = 1.0
_WAIT = 10.0
"""Seconds for which the tracker is asked at a time: it does not tell who waits that the boards have gone."""
_MARGIN = 20.0
"""Seconds after which a board that should have ended a session itself counts as lost."""


class TrackerMeasurer(WorkerMeasurer):
    """Measures on the boards of a key; see `WorkerMeasurer`.

    Parameters
    ----------
    task : Task
    tracker : str
        ``"HOST:PORT"``.
    key : str
    effort : Effort
    timeout : float
        Seconds for a candidate, on the board.
    patience : float
        Seconds for which a board is waited for, while all are gone or busy. A candidate that finds none is ``"lost"``:
        not measured, and no worse for it. Those after it wait no longer, until there is a board again.
    drift : Drift, optional
        That of the tasks before.

    Raises
    ------
    AgqError
        If `fleet_of` does.
    """

    def __init__(
        self,
        task: Task,
        tracker: str,
        key: str,
        effort: Effort = Effort(),  # noqa: B008
        timeout: float = TIMEOUT,
        patience: float = PATIENCE,
        drift: Drift | None = None,
    ) -> None:
        fleet = fleet_of(tracker, key, task.device)
        super().__init__(task, effort, timeout, fleet.boards, "board", drift)
        self._emulated, self._tracker, self._key, self._patience = fleet.emulated, tracker, key, patience
        self._lock, self._said = threading.Lock(), ""
        self._gone_since: float | None = None

    def _ask(self, worker: Worker, job: dict) -> dict:
        """Measure on whatever board comes; once more on another one if the board goes away."""
        job |= {"tracker": self._tracker, "key": self._key, "device": asdict(self.task.device)}
        job["emulated"] = self._emulated
        losses = 0
        while True:
            board: list[str] = []
            begun = time.monotonic()
            answer = self._once(worker, job, _WAIT, board)
            found = bool(board) and answer.get("kind") != UNFIT
            self._note(found, begun)
            if answer.get("kind") not in NO_VERDICT or self.crew.stopped:
                return answer
            if found:  # it was there when the candidate began
                losses += 1
                if losses >= _LOSSES:
                    return {"kind": CRASHED, "text": f"{losses} boards were lost while it ran: {answer['text']}"}
                self._say(f"{answer['text']}: what it measured is measured again, on the next board")
            elif self._patience_left() <= 0:
                return answer
            else:
                self._say(f"{answer['text']}; waiting for a board, {self._patience / 60:.0f} minutes at most")
            self.crew.rest(_PAUSE)

    def _patience_left(self) -> float:
        """Return the seconds for which a board is still waited for, all candidates together."""
        with self._lock:
            gone = self._gone_since
        return self._patience if gone is None else gone + self._patience - time.monotonic()

    def _note(self, found: bool, begun: float) -> None:
        """Note whether a candidate that asked at a time found a board, and say when there is one again."""
        with self._lock:
            back = found and self._gone_since is not None
            self._gone_since = None if found else min(self._gone_since or begun, begun)
        if back:
            self._say("there is a board again")

    def _once(self, worker: Worker, job: dict, wait: float, board: list[str]) -> dict:
        """Ask for a board once; its name is put into `board`."""

        def told(answer: dict) -> float:
            board.append(answer["board"])
            return job["limit"] + _MARGIN

        try:
            return worker.ask(job | {"wait": wait}, wait + _MARGIN, told)
        except WorkerEnded as error:
            return {"kind": LOST, "text": f"{board[0] if board else 'a board'}: {error}"}
        except WorkerLate:
            where = board[0] if board else f"the tracker {self._tracker}"
            return {"kind": LOST, "text": f"{where} has not answered in time"}

    def _say(self, text: str) -> None:
        """Say what goes on, once."""
        with self._lock:
            if text == self._said:
                return
            self._said = text
        say(text)


_checked: dict[tuple, Fleet] = {}
"""The boards of the keys that this process has used already."""


def fleet_of(tracker: str, key: str, device: Device) -> Fleet:
    """Return the boards of a key.

    They are checked the first time. A task that begins when they have gone waits for them as one that is being measured
    does, and each board is looked at again before a candidate.

    Raises
    ------
    AgqError
        If `check_fleet` does, the first time in this process.
    """
    name = tracker, key, device.name
    if name not in _checked:
        _checked[name] = check_fleet(tracker, key, device)
    with contextlib.suppress(AgqError):
        registered = tracker_summary(*parse_tracker(tracker)).get(key, {"boards": []})["boards"]
        _checked[name] = replace(_checked[name], boards=max(1, len(registered)))
    return _checked[name]
