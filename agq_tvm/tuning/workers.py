"""The other end of `worker.py`: a process that is asked with a time limit and ended when it does not answer."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from agq_tvm.boards.processes import last_line

_START_LIMIT = 300.0
"""Seconds: the machine may be busy with other things."""
_POLL = 0.02


class WorkerEnded(Exception):
    """A worker ended while it was asked; the text says how.

    Attributes
    ----------
    killed : bool
        Whether something else ended it, by signal 9.
    """

    def __init__(self, text: str, killed: bool = False):
        super().__init__(text)
        self.killed = killed


class WorkerUnfit(WorkerEnded):
    """A worker ended before it was asked anything: no fault of a candidate."""


class WorkerLate(Exception):
    """A worker did not answer in time and was ended."""


class Worker:
    """A process of `agq_tvm.tuning.worker`, started when it is first asked, and again after it ended.

    Parameters
    ----------
    kind : str
        What it does: ``"here"`` and ``"board"`` measure, on this machine and on boards, ``"build"`` builds.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._process: subprocess.Popen | None = None
        self._buffer = b""
        self._log = tempfile.NamedTemporaryFile(prefix="agq-worker-", suffix=".log")

    @property
    def pid(self) -> int | None:
        """Number of the process, None while there is none."""
        return self._process.pid if self._process else None

    def ask(self, job: dict, limit: float, told: Callable[[dict], float | None] = lambda _: None) -> dict:
        """Give a job to the process and return its answer.

        Parameters
        ----------
        job : dict
            What goes into JSON.
        limit : float
            Seconds for it, the start of the process not counted.
        told : callable
            Gets what the process says before its answer, and may return a new limit from then on.

        Raises
        ------
        WorkerEnded
            `WorkerUnfit`, if it could not even begin.
        WorkerLate
        """
        try:
            self._start()
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._line(time.monotonic() + limit)
            while answer.keys() == {"board"}:
                more = told(answer)
                answer = self._line(time.monotonic() + (limit if more is None else more))
        except BrokenPipeError:
            raise self._end() from None
        except BaseException:
            self.close()
            raise
        return answer

    def kill(self) -> None:
        """End the process and what it started, a linker say, from any thread; whoever asks it is told."""
        process = self._process
        if process and process.poll() is None:
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process:
            self.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                with suppress(BrokenPipeError):  # a job that it ended before
                    stream.close()
        self._process, self._buffer = None, b""

    def _start(self) -> None:
        if self._process and self._process.poll() is not None:
            self.close()
        if self._process:
            return
        self._log.truncate(0)
        with open(self._log.name, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "agq_tvm.tuning.worker", self.kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(),
                start_new_session=True,  # Ctrl-C is for the tuner, which ends its workers
            )
        try:
            self._line(time.monotonic() + _START_LIMIT)
        except WorkerEnded as error:
            raise WorkerUnfit(f"a process that measures or builds cannot be started: {error}") from None

    def _line(self, deadline: float) -> dict:
        """Return the next line that the process says."""
        stream = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([stream], [], [], left)[0]:
                raise WorkerLate
            part = os.read(stream, 1 << 16)
            if not part:
                raise self._end()
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def _end(self) -> WorkerEnded:
        """Say how the process ended."""
        code = self._process.wait()
        if code < 0:
            words = f"its process was ended by signal {-code} ({signal.strsignal(-code)})"
            return WorkerEnded(words, killed=-code == signal.SIGKILL)
        return WorkerEnded(f"its process ended with code {code}: {last_line(self._log.name)}")


class Crew:
    """Workers that some threads share: there are no more of those than workers.

    Parameters
    ----------
    workers : list of Worker
    """

    def __init__(self, workers: list[Worker]) -> None:
        self.workers = workers
        self._free = list(workers)
        self._stopped = threading.Event()

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped.is_set()

    def rest(self, seconds: float) -> None:
        """Sleep, until `stop` at the longest."""
        self._stopped.wait(seconds)

    @contextmanager
    def one(self) -> Iterator[Worker]:
        """Have a worker for oneself.

        Raises
        ------
        WorkerEnded
            If the crew was stopped.
        """
        worker = self._free.pop()
        try:
            if self.stopped:
                raise WorkerEnded("it was not begun any more")
            yield worker
        finally:
            self._free.append(worker)

    def stop(self) -> None:
        """End what the workers do; none is asked any more."""
        self._stopped.set()
        ended: set[Worker] = set()
        while busy := [worker for worker in self.workers if worker not in self._free]:
            for worker in busy:  # time and again: the process of one that was asked just now is only being started
                worker.kill()
            ended.update(busy)
            time.sleep(_POLL)
        for worker in ended:  # one that had just answered would be taken for alive
            worker.close()


_idle: list[Worker] = []
_idle_lock = threading.Lock()


def borrow(kind: str) -> Worker:
    """Return a worker, one that was given back if there is one: to start a process takes seconds."""
    with _idle_lock:
        found = next((worker for worker in _idle if worker.kind == kind), None)
        if found:
            _idle.remove(found)
    return found or Worker(kind)


def give_back(worker: Worker) -> None:
    """Keep a worker for whoever needs one next; it ends with this process."""
    with _idle_lock:
        _idle.append(worker)


def _environment() -> dict[str, str]:
    """Return a worker's environment: as ours, and able to import what we can."""
    folder = str(Path(__file__).parents[2])
    paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
