"""The tuner: tasks in, records out. What it has measured is in the library before the next candidate is asked for."""

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tvm.s_tir.meta_schedule.runner import RunnerInput

from agq_tvm import interrupt
from agq_tvm.errors import AgqError
from agq_tvm.kernels.attrs import describe
from agq_tvm.kernels.nearest import nearest
from agq_tvm.kernels.record import MEASURED, Record
from agq_tvm.kernels.record_library import Library
from agq_tvm.progress import say
from agq_tvm.tuning.allotment import allot, weight_of
from agq_tvm.tuning.builder import Builder
from agq_tvm.tuning.claims import Claims
from agq_tvm.tuning.confirm import Turn, in_turns, to_confirm, verdict
from agq_tvm.tuning.measure import NO_VERDICT, UNFIT, kind_of
from agq_tvm.tuning.progress import Display, Progress
from agq_tvm.tuning.provenance import cpu_of, provenance_of
from agq_tvm.tuning.search import CostModel, Search, tuning_record
from agq_tvm.tuning.task import Task

_POLL = 0.02
_HINTS = 2
_FULL = ("No space left", "File too large")
"""What a build says that failed for want of room: no fault of its candidate."""
_MOST_LOST = 3
"""Candidates in a row without a verdict after which the boards are given up."""


@dataclass(frozen=True)
class Settings:
    """How to tune.

    Attributes
    ----------
    trials : int
        For all tasks together; what the library has already counts.
    strategy : str
        One of `agq_tvm.tuning.search.STRATEGIES`.
    time_limit : float or None
        Seconds after which no more candidates are measured.
    how : str
        ``"measured"`` or ``"simulated"``: what records are marked with.
    emulated : bool
        Whether boards are emulated, so that their time means nothing.
    overlap : bool
        Whether candidates are built while others are measured; not where both happen on one machine.
    batch : int
        Candidates that the search proposes at a time.
    default : bool
        Whether the hand-made schedule is a candidate; if not, it is only what the best are held against in the end.
    builders : int or None
        Processes that build; by default one for each processor.
    seed : int
    """

    trials: int
    strategy: str = "evolutionary"
    time_limit: float | None = None
    how: str = MEASURED
    emulated: bool = False
    overlap: bool = False
    batch: int = 8
    default: bool = True
    builders: int | None = None
    seed: int = 0


@dataclass
class _Measuring:
    future: Any
    point: dict[str, int]
    path: Path


@dataclass
class _Flow:
    """A task's candidates between the search and the library."""

    building: dict[Future, tuple[dict[str, int], Path]] = field(default_factory=dict)
    built: list[tuple[dict[str, int], Path]] = field(default_factory=list)
    measuring: list[_Measuring] = field(default_factory=list)
    results: list[tuple[dict[str, int], list[float] | None]] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.building) + len(self.built) + len(self.measuring)


class Tuner:
    """Tunes tasks, the weightiest first.

    Parameters
    ----------
    library : Library
        Records go there, one by one.
    tasks : sequence of Task
    runner_of : callable
        ``f(task)``: MetaSchedule's runner for it; may have ``close()``, and ``outcomes`` as
        `agq_tvm.tuning.runner.MeasuringRunner` has.
    settings : Settings
    display : Display
    make_builder : callable
        Makes what builds candidates, see `Builder`.
    """

    def __init__(
        self,
        library: Library,
        tasks: Sequence[Task],
        runner_of: Callable[[Task], Any],
        settings: Settings,
        display: Display,
        make_builder: Callable[[], Builder] | None = None,
    ):
        self._make_builder = make_builder or (lambda: Builder(settings.builders))
        self.library, self.runner_of, self.settings, self.display = library, runner_of, settings, display
        self.tasks = sorted(tasks, key=lambda task: -weight_of(task))
        sizes = {task.name: self._size(task) for task in self.tasks}
        wanted = allot(self.tasks, sizes, settings.trials)
        self.progress = {task.name: Progress(task, wanted[task.name]) for task in self.tasks}
        self._model = CostModel() if settings.strategy == "evolutionary" else None
        self._claims = Claims(library.files[0].path.parent)
        self._begun, self._measured, self._lost, self._number = 0.0, 0, 0, 0
        self._confirmed: set[str] = set()

    def _size(self, task: Task) -> int:
        return task.space.size - (not self.settings.default)

    def run(self) -> list[Progress]:
        """Tune until all tasks have their trials, or time is up; return where each of them is.

        Raises
        ------
        AgqError
            If no record can be written, or no board can measure.
        """
        self._begun = time.monotonic()
        for task in self.tasks:
            self._refresh(task)
        # The builders end first: a folder that is written to cannot be removed.
        with tempfile.TemporaryDirectory(prefix="agq-tune-") as folder, self._make_builder() as self._builder:
            self._folder = Path(folder)
            while not self._late() and (task := self._next()):
                try:
                    self._tune(task)
                finally:
                    self._claims.release(task.name)
        return list(self.progress.values())

    def _next(self) -> Task | None:
        """Claim the weightiest task that lacks trials; wait while other tuners have all of these."""
        told = False
        while not self._late():
            left = [task for task in self.tasks if self.lacks(task)]
            if not left:
                return None
            for task in left:
                if self._claims.claim(task.name):
                    if self.lacks(task):
                        return task
                    self._claims.release(task.name)
            if not told:
                say(f"other tuners of this library have what is left ({len(left)} of the tasks): waiting for them")
                told = True
            time.sleep(0.5)
        return None

    def lacks(self, task: Task) -> bool:
        """Tell whether a task lacks trials, or the confirmation of its best."""
        if self._refresh(task).missing:
            return True
        return self._confirms and task.name not in self._confirmed and bool(self._chosen(task))

    @property
    def _confirms(self) -> bool:
        return self.settings.how == MEASURED and not self.settings.emulated

    def _chosen(self, task: Task) -> list[Record | None]:
        alike = [record for record in self.library.of_task(task.name) if self._alike(task, record)]
        return to_confirm(task, self._known(task), alike, self.settings.default)

    def _late(self) -> bool:
        """Tell whether time is up; every loop asks, so that Ctrl-C ends it."""
        interrupt.check()
        limit = self.settings.time_limit
        return limit is not None and time.monotonic() - self._begun >= limit

    def _known(self, task: Task) -> list[Record]:
        """Return what the library has of a task, as this run would measure it."""
        found = {}
        for record in self.library.of_task(task.name):
            if self._alike(task, record) and not record.confirmed and task.space.allows(record.decisions):
                found[record.key] = record
        return list(found.values())

    def _alike(self, task: Task, record: Record) -> bool:
        """Tell whether a record was made as this run makes them, on such a processor: other times do not compare."""
        settings = self.settings
        own = settings.how, settings.emulated, cpu_of(task, self._local)
        return (record.how, record.emulated, record.provenance.get("cpu")) == own

    @property
    def _local(self) -> bool:
        """Whether this machine measures: where builds overlap it does not."""
        return self.settings.how == MEASURED and not self.settings.overlap

    def _refresh(self, task: Task) -> Progress:
        progress, known = self.progress[task.name], self._known(task)
        default = task.space.default
        good = [record.time for record in known if record.seconds]
        own = [record.time for record in known if record.seconds and record.decisions == default]
        progress.known, progress.failures = len(known), len(known) - len(good)
        progress.best, progress.default = min(good, default=None), min(own, default=None)
        progress.time_left = self._time_left()
        return progress

    def _time_left(self) -> float | None:
        if not self._measured:
            return None
        spent = time.monotonic() - self._begun
        left = spent / self._measured * sum(progress.missing for progress in self.progress.values())
        return left if self.settings.time_limit is None else max(0, min(left, self.settings.time_limit - spent))

    def _tune(self, task: Task) -> None:
        known = [(record.decisions, record.seconds) for record in self._known(task)]
        settings, progress = self.settings, self.progress[task.name]
        self.display.update(progress)
        search = Search(task, self._model, known, settings.batch, settings.default, settings.seed, self._hints(task))
        runner = self.runner_of(task)
        try:
            self._search(task, search, runner)
            if self._confirms and not self._late():
                self._confirm(task, runner)
        finally:
            if hasattr(runner, "close"):
                runner.close()
            self.display.finish(progress)

    def _hints(self, task: Task) -> list[dict[str, int]]:
        """Return what was best for this kernel elsewhere, and what the kernels most like it suggest."""
        if not self.settings.default:
            return []
        hints: list[dict[str, int]] = []
        for record, decisions in nearest(self.library, task.kernel, task.instruction_set, task.threads):
            elsewhere = record.task != task.name or not self._alike(task, record)
            if elsewhere and decisions not in [task.space.default, *hints]:
                hints.append(decisions)
        return hints[:_HINTS]

    def _search(self, task: Task, search: Search, runner) -> None:
        flow, progress = _Flow(), self.progress[task.name]
        while not self._late():
            self._start(task, search, flow, progress.missing)
            if not flow.count:
                progress.wanted = min(progress.wanted, progress.known)  # there is nothing more to propose
                return
            moved = self._take_built(task, flow, progress)
            moved += self._hand_over(flow, runner)
            moved += self._take_measured(task, search, flow, runner)
            if flow.results and (len(flow.results) >= self.settings.batch or not flow.count):
                search.tell(flow.results)
                flow.results = []
            if not moved:
                time.sleep(_POLL)

    def _new_path(self) -> Path:
        """Name a candidate's library; no name comes twice, since a process that loaded one keeps it under its name."""
        self._number += 1
        return self._folder / f"candidate-{self._number}.so"

    def _start(self, task: Task, search: Search, flow: _Flow, missing: int) -> None:
        """Have the next candidates built, if few enough are on their way."""
        room = missing - flow.count
        if room <= 0 or flow.count > (self.settings.batch // 2 if self.settings.overlap else 0):
            return
        for point in search.propose(min(room, self.settings.batch)):
            path = self._new_path()
            flow.building[self._builder.submit(task, point, path)] = point, path

    def _take_built(self, task: Task, flow: _Flow, progress: Progress) -> int:
        done = [future for future in flow.building if future.done()]
        for future in done:
            point, path = flow.building.pop(future)
            error = future.result()
            if error is None:
                flow.built.append((point, path))
            elif any(words in error for words in _FULL):
                raise AgqError(f"the disk is full while building in {self._folder}: free some space, then go on")
            else:
                self._record(task, point, None, error, {})
                flow.results.append((point, None))
        return len(done)

    def _hand_over(self, flow: _Flow, runner) -> int:
        """Give built candidates to the runner; on one machine when all are built."""
        if flow.building and not self.settings.overlap:
            return 0
        handed = len(flow.built)
        while flow.built:
            point, path = flow.built.pop(0)
            flow.measuring.append(_Measuring(runner.run([RunnerInput(str(path), "cpu", [])])[0], point, path))
        return handed

    def _take_measured(self, task: Task, search: Search, flow: _Flow, runner) -> int:
        done = [each for each in flow.measuring if each.future.done()]
        for each in done:
            flow.measuring.remove(each)
            seconds, error, told = _outcome(each.future, runner, str(each.path))
            each.path.unlink(missing_ok=True)
            if error and kind_of(error) in NO_VERDICT:
                self._not_measured(error)
                search.give_back(each.point)
                continue
            self._lost = 0
            self._record(task, each.point, seconds, error, told)
            flow.results.append((each.point, seconds))
        return len(done)

    def _not_measured(self, error: str) -> None:
        self._lost += 1
        text = error.partition(": ")[2]
        if kind_of(error) == UNFIT:
            raise AgqError(text)
        if self._lost >= _MOST_LOST:
            raise AgqError(f"no board measures any more ({text}): look at them, then run the same command again")

    def _record(self, task: Task, point: dict, seconds: list[float] | None, error: str | None, told: dict) -> None:
        trace = tuning_record(task, point, seconds) if seconds else None
        provenance = self._provenance(task, told)
        self.library.append(_record(task, point, seconds, error, self.settings.how, trace, provenance))
        self._measured += 1
        self.progress[task.name].measured += 1
        self.display.update(self._refresh(task))

    def _provenance(self, task: Task, told: dict) -> dict:
        return provenance_of(task, {"emulated": self.settings.emulated} | told, self._local)

    def _confirm(self, task: Task, runner) -> None:
        """Measure the best again, in turns with the default; what fails then is left as it was."""
        self._confirmed.add(task.name)
        chosen = self._chosen(task)
        if not chosen:
            return
        paths = [self._new_path() for _ in chosen]
        points = [record.decisions if record else task.space.default for record in chosen]
        builds = [self._builder.submit(task, point, path) for point, path in zip(points, paths, strict=True)]
        if any([build.result() is not None for build in builds]):
            return
        errors: list[str] = []

        def measure(number: int) -> Turn | None:
            future = runner.run([RunnerInput(str(paths[number]), "cpu", [])])[0]
            seconds, error, about = _outcome(future, runner, str(paths[number]))
            errors.extend([error] if error else [])
            return None if error or self._late() else Turn(seconds, about)

        found = in_turns(len(chosen), measure)
        if found is None:
            if errors:
                say(f"{task.name}: its best candidate is not confirmed, {errors[0]}")
            return
        for number, turns in found.items():
            record, held = chosen[number], verdict(found[0], turns)
            if record is not None and held is not None:
                provenance = self._provenance(task, held[1])
                self.library.append(replace(record, seconds=tuple(held[0]), provenance=provenance))


def _outcome(future, runner, path: str) -> tuple[list[float] | None, str | None, dict]:
    """Return seconds, error, and what is told besides of a measurement."""
    result = future.result()
    error = str(result.error_msg) if result.error_msg is not None else None
    seconds = [float(f"{float(value):.6g}") for value in result.run_secs] if error is None else None
    known = getattr(runner, "outcomes", {}).pop(path, None)
    measured = known.result().measurement if known else None
    if measured is None:
        return seconds, error, {}
    names = ("outliers", "spread", "drift", "hot", "board", "emulated", "status")
    return seconds, error, {name: getattr(measured, name) for name in names}


def _record(task: Task, point, seconds, error, how: str, trace, provenance: dict) -> Record:
    kernel = describe(task.kernel)
    short = error[:500] if error else None
    return Record(
        task.name, kernel, task.isa, dict(point), tuple(seconds) if seconds else None, short, how, trace, provenance
    )
