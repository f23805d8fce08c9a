"""All engines at once: which are installed, their processes, and rounds that go through them in turn."""

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from agq_tvm.errors import AgqError
from benchmarks.peers import environments
from benchmarks.peers.base import Form, ModelForm
from benchmarks.peers.host import Worker

WORKER = "benchmarks.peers.worker"
FEWEST_ROUNDS = 3
PAUSES = 0.005, 0.25
"""Seconds between two engines, with one thread and with more: the others of some go on spinning after their work."""


@dataclass
class Fleet:
    """Processes of engines.

    Parameters
    ----------
    work : Path
        Where environments are, and where engines keep files.
    threads : int

    Attributes
    ----------
    workers : dict of str to Worker
        By the form's name.
    versions : dict of str to str
        Of the packages that were found.
    missing : dict of str to str
        Forms that were not measured, or not to the end, with the reason.
    """

    work: Path
    threads: int
    workers: dict[str, Worker] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def start(self, engines: dict[str, ModuleType], attribute: str, wanted) -> dict[str, Form | ModelForm]:
        """Start a process for each form of each engine that is installed.

        Parameters
        ----------
        engines : dict of str to module
        attribute : str
            ``"PRODUCTS"`` or ``"MODELS"``.
        wanted : callable
            Whether a form is.

        Returns
        -------
        dict of str to Form or ModelForm
            Those that were started.
        """
        started = {}
        for engine in engines.values():
            forms = [form for form in getattr(engine, attribute, ()) if wanted(form)]
            if not forms:
                continue
            version = environments.installed_version(self.work, engine)
            if version is None:
                for form in forms:
                    self.leave_out(form.name, f"{engine.PACKAGE} is not installed: python -m benchmarks.peers")
                continue
            self.versions[engine.PACKAGE] = version
            for form in forms:
                with self.guarded(form.name):
                    self.workers[form.name] = self.worker(engine, form.name)
                    started[form.name] = form
        return started

    def worker(self, engine: ModuleType, form: str) -> Worker:
        """Start the process of one form."""
        python = environments.interpreter(self.work, engine.ENVIRONMENT)
        short = engine.__name__.rpartition(".")[2]
        kept = self.work / "kept" / short
        command = [python, "-m", WORKER, engine.__name__, form, str(self.threads), str(kept.absolute())]
        log = self.work / "logs" / f"{form.replace(' ', '-').replace(',', '')}-{self.threads}.txt"
        return Worker(form, command, cores(self.threads), log)

    def leave_out(self, form: str, reason: str) -> None:
        """Note, loudly, that a form is not measured any further."""
        print(f"NOT MEASURED: {form}: {reason}", file=sys.stderr)
        self.missing[form] = reason.replace(f"{self.work}/", "DIR/")  # reports are published
        if form in self.workers:
            self.workers.pop(form).stop()

    def guarded(self, form: str) -> "_Guard":
        """Return a context in which an `AgqError` ends the form, and not the run."""
        return _Guard(self, form)

    def stop(self) -> None:
        """End all processes."""
        for worker in self.workers.values():
            worker.stop()
        self.workers.clear()


@dataclass
class _Guard:
    fleet: Fleet
    form: str

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _) -> bool:
        if kind is not None and issubclass(kind, AgqError):
            self.fleet.leave_out(self.form, str(error))
            return True
        return False


def named(form: Form | ModelForm, only: list[str]) -> bool:
    """Say whether a form's name holds one of some texts; if there are none, yes. Ours is always meant."""
    return not only or any(text.lower() in form.name.lower() for text in [*only, "agq_tvm"])


def cores(count: int) -> list[int]:
    """Return the processors that every engine is bound to: the last ones, as the first gets most interrupts.

    Raises
    ------
    AgqError
        If there are not so many.
    """
    available = sorted(os.sched_getaffinity(0))
    if count > len(available):
        raise AgqError(f"{count} threads need {count} processors, and this process has {len(available)}")
    return available[-count:]


def rounds_of(steps: dict, threads: int, rounds: int, seconds: float, fewest: int = FEWEST_ROUNDS) -> dict[str, list]:
    """Go through steps in turn, round after round; the first round is not counted.

    Parameters
    ----------
    steps : dict of str to callable
        Returns what is kept, or None to be left out from then on.
    threads : int
        That each of them uses.
    rounds : int
        That are counted, at most.
    seconds : float
        After which no round is begun, except to have the fewest.
    fewest : int

    Returns
    -------
    dict of str to list
        What each step returned in the rounds that it came through.
    """
    kept: dict[str, list] = {name: [] for name in steps}
    alive, began = dict(steps), time.monotonic()
    for number in range(rounds + 1):
        if number > min(rounds, fewest) and time.monotonic() - began > seconds:
            break
        for name, step in list(alive.items()):
            value = step()
            time.sleep(PAUSES[threads > 1])
            if value is None:
                del alive[name]
            elif number:
                kept[name].append(value)
    return kept


def lower(times: dict[str, float], threads: int) -> float:
    """Return seconds: the lower of wall-clock and CPU time on one thread, wall-clock time on more."""
    return min(times["wall"], times["cpu"]) if threads == 1 else times["wall"]
