"""Tune a checkpoint's kernels: on this machine, on boards, or simulated."""

import re
import time
from dataclasses import dataclass, field

from agq_tvm.errors import AgqError
from agq_tvm.flow.tasks import extract_tasks
from agq_tvm.interrupt import kept
from agq_tvm.kernels.record import MEASURED, SIMULATED, Record
from agq_tvm.kernels.record_library import Library, open_library
from agq_tvm.progress import say
from agq_tvm.targets import Device, detect, load_device
from agq_tvm.tuning.drift import Drift
from agq_tvm.tuning.task import Task


@dataclass(frozen=True)
class TuneRequest:
    """What `agq tune` is asked for.

    Attributes
    ----------
    checkpoint, target : str
    trials : int
        For all tasks together; what the library has already counts.
    tracker, key : str or None
        Where boards are; without them candidates are measured here, unless `simulate` is set.
    simulate : bool
    only : str or None
        Part of the names of tasks that are tuned; the others are left alone.
    strategy : str
        See `agq_tvm.tuning.search.STRATEGIES`.
    time_limit : float or None
        Seconds.
    library : str or None
        A directory; by default the user's own library.
    context : int or None
        Length of the caches, as for `agq compile`.
    cache : str
    timeout : float
        Seconds for a candidate.
    cooldown : float
        Seconds that a board rests before each candidate.
    """

    checkpoint: str
    target: str
    trials: int
    tracker: str | None = None
    key: str | None = None
    simulate: bool = False
    only: str | None = None
    strategy: str = "evolutionary"
    time_limit: float | None = None
    library: str | None = None
    context: int | None = None
    cache: str = "float16"
    timeout: float = 30.0
    cooldown: float = 0.0


def tune(request: TuneRequest) -> dict:
    """Tune and return what came of it.

    Returns
    -------
    dict
        ``library``, ``device``, ``how``, ``seconds``, ``measured`` and ``tasks``: for each its ``task``, ``trials``,
        ``wanted``, ``measured``, ``failures``, ``best``, ``default`` (seconds, or None), and ``speedup``.

    Raises
    ------
    AgqError
        If there is nothing to tune, nothing to measure with, or no record can be written.
    """
    from agq_tvm.flow.compile import cache_length
    from agq_tvm.quantize.checkpoint import read_checkpoint
    from agq_tvm.tuning.tuner import Settings, Tuner

    begun = time.monotonic()
    device = load_device(request.target)
    boards = _boards(request, device)
    context = cache_length(read_checkpoint(request.checkpoint), request.context)
    say(f"looking for the kernels of {request.checkpoint}")
    tasks = chosen(extract_tasks(request.checkpoint, device, context, request.cache), request.only)
    library = open_library(device.name, request.library)
    settings = Settings(
        request.trials,
        request.strategy,
        request.time_limit,
        how=SIMULATED if request.simulate else MEASURED,
        emulated=boards.emulated,
        overlap=request.simulate or request.tracker is not None,
    )
    tuner = Tuner(library, tasks, boards.runner, settings, boards.display(device))
    done = [progress for progress in tuner.progress.values() if not tuner.lacks(progress.task)]
    path = library.files[0].path
    count = "1 task" if len(tasks) == 1 else f"{len(tasks)} tasks"
    say(f"{count}, {len(done)} of them with all trials; records go to {path}")
    total = sum(progress.wanted for progress in tuner.progress.values())
    if total > request.trials:
        say(f"{request.trials} trials are not two for each task: there will be {total}")
    if request.simulate:
        say("simulated times leave out caches and memory, and so does their ranking: any measured record comes first")
    if boards.emulated:
        say("the boards are emulated: candidates are checked there, but their times mean nothing and are not shown")
    for problem in library.problems:
        say(f"left out: {problem}")
    try:
        with kept():
            progress = tuner.run()
    except KeyboardInterrupt:
        say(f"interrupted: every measurement is in {path}, and the same command goes on from there")
        raise
    missing = sum(each.missing for each in progress)
    if missing:
        say(f"time is up with {missing} trials to go: the same command goes on from there")
    return _result(request, device, library, progress, time.monotonic() - begun)


def chosen(tasks: list[Task], only: str | None) -> list[Task]:
    """Return the tasks whose names have `only` in them."""
    found = [task for task in tasks if only is None or only in task.name]
    if not found:
        # Without what differs between kernels of a kind: sizes, instruction set, version.
        kinds = sorted({re.split(r"_m\d+_|\.", task.name)[0] for task in tasks})
        raise AgqError(f"{only} is in the name of none of the {len(tasks)} tasks, which begin with {', '.join(kinds)}")
    return found


def _result(request: TuneRequest, device: Device, library: Library, progress, seconds: float) -> dict:
    tasks = []
    for each in progress:
        best = library.best(each.task.name, each.task.space.allows)
        default = _seconds_of_default(library, each.task, best) if best else None
        tasks.append(
            {
                "task": each.task.name,
                "trials": each.known,
                "wanted": each.wanted,
                "measured": each.measured,
                "failures": each.failures,
                "best": best.time if best else None,
                "default": default,
                "speedup": round(default / best.time, 3) if default else None,
            }
        )
    return {
        "library": str(library.files[0].path),
        "device": device.name,
        "how": SIMULATED if request.simulate else MEASURED,
        "seconds": round(seconds, 1),
        "measured": sum(task["measured"] for task in tasks),
        "tasks": tasks,
    }


def _seconds_of_default(library: Library, task: Task, best: Record) -> float | None:
    """Return the time of the hand-made schedule, measured beside the best where that was confirmed."""
    if best.gain:
        return best.gain * best.time

    def origin(record: Record) -> tuple:
        return record.how, record.provenance.get("cpu")

    own = [record for record in library.of_task(task.name) if record.decisions == task.space.default]
    alike = [each.time for each in own if each.usable and not each.confirmed and origin(each) == origin(best)]
    return min(alike, default=None)


@dataclass(frozen=True)
class _Boards:
    """Where candidates are measured."""

    request: TuneRequest
    emulated: bool = False
    drift: Drift = field(default_factory=Drift)

    def display(self, device: Device):
        """Return what shows a line for each task, with times where they mean something."""
        from agq_tvm.tuning.display import Lines

        if self.request.simulate or self.request.tracker:
            return Lines(meaningful=not self.emulated)
        from agq_tvm.tuning.limits import Limits

        return Lines(Limits(device))

    def runner(self, task: Task):
        """Return MetaSchedule's runner for a task."""
        from agq_tvm.tuning.runner import MeasuringRunner

        return MeasuringRunner(self._measurer(task))

    def _measurer(self, task: Task):
        request = self.request
        if request.simulate:
            from agq_tvm.tuning.simulate import TIMEOUT, SimulatedMeasurer

            return SimulatedMeasurer(task, max(request.timeout, TIMEOUT))
        if request.tracker:
            from agq_tvm.tuning.measure import Effort
            from agq_tvm.tuning.tracker_measurer import TrackerMeasurer

            effort = Effort(cooldown=request.cooldown)
            return TrackerMeasurer(task, request.tracker, request.key, effort, request.timeout, drift=self.drift)
        from agq_tvm.tuning.local_measurer import LocalMeasurer, effort_here

        return LocalMeasurer(task, effort_here(cooldown=request.cooldown), request.timeout, self.drift)


def _boards(request: TuneRequest, device: Device) -> _Boards:
    """Check that there is something to measure with before any work is done."""
    if bool(request.tracker) != bool(request.key):
        raise AgqError("--tracker and --key go together: where the tracker is, and what the boards are called there")
    if request.tracker:
        from agq_tvm.tuning.tracker_measurer import fleet_of

        return _Boards(request, fleet_of(request.tracker, request.key, device).emulated)
    if request.simulate:
        from agq_tvm.tuning.simulate import check_simulation

        check_simulation(device)
        return _Boards(request)
    missing = detect.missing_features(device, detect.cpu_features(), detect.machine())
    if missing:
        raise AgqError(
            f"this machine cannot run code for {device.name}: it lacks {', '.join(missing)}; measure on a board "
            "(--tracker, --key) or take --simulate"
        )
    return _Boards(request)
