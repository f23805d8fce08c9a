"""Measurements a minute that one and several emulated boards under a key make, and what the tracker costs.

    python -m benchmarks.fleet [--boards 3] [--cooldown 1] [--trials 24] [--rounds 3]

Candidates are built beforehand. With a rest before each measurement two cores are not the limit; without it they are,
so the core time is printed, too. Then the same trials, built one after the other: through the tracker, and each in a
process of its own directly under QEMU, in turn.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from agq_tvm.boards import emulate, processes
from agq_tvm.kernels import tunable
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.targets import load_device
from agq_tvm.tuning.block_counts import emulated_runner
from agq_tvm.tuning.candidate import export_candidate, make_candidate
from agq_tvm.tuning.helpers import MAIN, SWEEP, digest_name, fill_name
from agq_tvm.tuning.measure import Argument, Effort
from agq_tvm.tuning.reference import arguments_of
from agq_tvm.tuning.task import Task
from agq_tvm.tuning.tracker_measurer import TrackerMeasurer
from benchmarks.tables import RESULTS, aligned, report, write_report

DEVICE = "raspberry-pi-4"
REPEATS = 3
SMALL, TYPICAL = (8, 256, 256), (128, 576, 576)
"""Rows, columns and channels: for counting measurements, and for the cost of a trial."""
_LIMIT = 600.0


@dataclass(frozen=True)
class Rate:
    """How fast boards measure.

    Attributes
    ----------
    per_minute : float
        Measurements.
    core_seconds : float
        Of one measurement: boards, workers, and this process.
    """

    per_minute: float
    core_seconds: float


def task_of(rows: int, columns: int, channels: int) -> Task:
    """Return the task of a quantized product of the device, on one thread."""
    device = load_device(DEVICE)
    kernel = LinearKernel(rows, columns, channels, 4, 32, True, None, False)
    return Task(kernel.name, kernel, device.instruction_set, device, 1)


def candidates(task: Task, count: int) -> list[dict | None]:
    """Return decisions of the task, spread over its space; none but the default where it has none."""
    space = tunable.space_of(task.kernel, task.instruction_set, task.threads)
    points = space.points() if space else [None]
    return [points[i * len(points) // count] if len(points) >= count else points[i % len(points)] for i in range(count)]


def build(task: Task, decisions: dict | None, path: Path) -> Path:
    """Compile a candidate to a library."""
    export_candidate(make_candidate(task, decisions), task.device, path)
    return path


def rate(measurer: TrackerMeasurer, paths: list[Path], programs: list[processes.Process]) -> Rate:
    """Measure libraries on all boards of a measurer, whose workers have been started."""
    core, begun = _core_seconds(measurer, programs), time.monotonic()
    outcomes = [future.result(_LIMIT) for future in [measurer.submit(str(path)) for path in paths]]
    seconds, core = time.monotonic() - begun, _core_seconds(measurer, programs) - core
    failed = [outcome.message for outcome in outcomes if outcome.message]
    if failed:
        raise SystemExit(f"a candidate was not measured: {failed[0]}")
    return Rate(60 * len(paths) / seconds, core / len(paths))


def _core_seconds(measurer: TrackerMeasurer, programs: list[processes.Process]) -> float:
    """Return what has been used so far: sessions are children of a board's server."""
    numbers = [program.pid for program in programs] + [worker.pid for worker in measurer.crew.workers if worker.pid]
    times = [psutil.Process(number).cpu_times() for number in numbers]
    theirs = sum(each.user + each.system + each.children_user + each.children_system for each in times)
    return theirs + time.process_time()


def rates(address: str, boards: int, cooldown: float, trials: int, rounds: int, folder: Path) -> dict[int, Rate]:
    """Return the median rate of one board and of several, measured in turn."""
    task = task_of(*SMALL)
    paths = [build(task, each, folder / f"{i}.so") for i, each in enumerate(candidates(task, trials))]
    running: dict[int, list[processes.Process]] = {1: [], boards: []}
    found: dict[int, list[Rate]] = {count: [] for count in running}
    effort = Effort(REPEATS, 0, 0, cooldown)
    with contextlib.ExitStack() as stack:
        for count, group in running.items():
            for _ in range(count):
                group.append(_board(address, f"fleet-of-{count}"))
                stack.callback(processes.stop, group[-1])
        measurers = {
            count: stack.enter_context(TrackerMeasurer(task, address, f"fleet-of-{count}", effort)) for count in running
        }
        for count, measurer in measurers.items():  # starts the workers
            rate(measurer, paths[:1] * count * 2, running[count])
        for _ in range(rounds):
            for count, measurer in measurers.items():
                found[count].append(rate(measurer, paths, running[count]))
    return {count: sorted(each, key=lambda one: one.per_minute)[len(each) // 2] for count, each in found.items()}


def _board(address: str, key: str) -> processes.Process:
    return emulate.start_board(load_device(DEVICE), address, key)


def trial_costs(address: str, trials: int, folder: Path) -> dict[str, list[float]]:
    """Return seconds of each trial: to build it, to measure it through the tracker, and directly under QEMU."""
    task = task_of(*TYPICAL)
    arguments, board = arguments_of(task), _board(address, "one")
    seconds: dict[str, list[float]] = {"build": [], "tracker": [], "direct": []}
    try:
        with TrackerMeasurer(task, address, "one", Effort(REPEATS, 0, 0)) as measurer:
            for number, decisions in enumerate([None, *candidates(task, trials)]):
                begun = time.monotonic()
                path = build(task, decisions, folder / "trial.so")
                built = time.monotonic()
                ways = {"tracker": lambda path=path: _over_tracker(measurer, path)}
                ways["direct"] = lambda path=path: _directly(task, arguments, path)
                for name in sorted(ways, reverse=number % 2):
                    start = time.monotonic()
                    ways[name]()
                    if number:  # the first one starts what stays
                        seconds[name].append(time.monotonic() - start)
                if number:
                    seconds["build"].append(built - begun)
    finally:
        processes.stop(board)
    return seconds


def _over_tracker(measurer: TrackerMeasurer, path: Path) -> None:
    message = measurer.submit(str(path)).result(_LIMIT).message
    if message:
        raise SystemExit(f"a candidate was not measured: {message}")


def _directly(task: Task, arguments: list[Argument], path: Path) -> None:
    """Do all that a measurement does in a process under QEMU."""
    tensors = [f"~{argument.dtype}:{'x'.join(map(str, argument.shape))}" for argument in arguments]
    own = ",".join(map(str, range(len(arguments))))
    (written,) = [place for place, argument in enumerate(arguments) if argument.written]
    digest = f"{digest_name(written)}:{written},{len(arguments)}"
    calls = [f"{fill_name(place)}:{place}" for place in range(len(arguments))]
    # A repeat is a sweep; the first, which is not counted, warms up.
    calls += [f"{MAIN}:{own}", digest, *[f"{SWEEP}:i{len(arguments)},{own}"] * (1 + REPEATS), digest]
    command = [*emulated_runner(task.device), str(task.threads), str(path), *tensors, "~int64:1", "--", *calls]
    result = subprocess.run([*command, f"={len(arguments)}"], capture_output=True, text=True, timeout=_LIMIT)
    if result.returncode:
        raise SystemExit(f"a candidate does not run under QEMU: {result.stderr.strip()}")
    if int.from_bytes(bytes.fromhex(result.stdout.split()[-1]), "little", signed=True) != arguments[written].digest:
        raise SystemExit("a candidate computes something else under QEMU")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--boards", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--cooldown", type=float, default=1.0, metavar="S", help="default: %(default)s s")
    parser.add_argument("--trials", type=int, default=24, metavar="N", help="of each round; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="their median counts; default: %(default)s")
    parser.add_argument("-o", "--output", default=RESULTS / "fleet.json", type=Path)
    arguments = parser.parse_args()
    tracker = emulate.start_tracker()
    rows, lines = [], [("boards", "rest s", "per minute", "x one board", "core s each")]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for cooldown in (arguments.cooldown, 0.0):
                settings = (cooldown, arguments.trials, arguments.rounds, Path(scratch))
                found = rates(tracker.tracker, arguments.boards, *settings)
                for count, one in found.items():
                    times = one.per_minute / found[1].per_minute
                    rows.append({"boards": count, "rest": cooldown, **vars(one), "times_one": times})
                    cells = (f"{cooldown:g}", f"{one.per_minute:.1f}", f"{times:.2f}", f"{one.core_seconds:.2f}")
                    lines.append((str(count), *cells))
            costs = trial_costs(tracker.tracker, arguments.trials, Path(scratch))
    finally:
        processes.stop(tracker)
    print(aligned(lines))
    medians = {name: statistics.median(values) for name, values in costs.items()}
    whole = [statistics.median(b + m for b, m in zip(costs["build"], costs[way], strict=True)) for way in costs]
    print(
        f"\na trial takes {medians['build']:.2f} s to build, {medians['tracker']:.2f} s to measure through the tracker,"
    )
    print(f"{medians['direct']:.2f} s directly under QEMU: with its build {100 * (whole[1] / whole[2] - 1):+.0f} %")
    contents = {"rates": rows, "trial_seconds": costs, "medians": medians, "tracker_times_direct": whole[1] / whole[2]}
    write_report(arguments.output, report("benchmarks.fleet", ("apache-tvm",), **contents))
    return 0


if __name__ == "__main__":
    sys.exit(main())
