"""What tuning brings: tuned kernels beside the hand-made ones, and whether the search finds those by itself.

    python -m benchmarks.tuning gains CKPT [--targets NAME,…] [--rows 1,16,128] [--library DIR] [--rounds N]
    python -m benchmarks.tuning search [--trials 200]

`gains` takes the records that `agq tune` left. Both forms of a kernel are measured in turns, each in a process that
holds nothing else, checked before they are timed; a ratio is that of two neighbours. `search` tunes products of
4096 x 4096 from nothing, the hand-made schedule left out, and holds what it finds against that. Exit code 1 if a bound
is not met.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from scipy import stats

from agq_tvm.cli.options import names, numbers
from agq_tvm.errors import AgqError
from agq_tvm.flow.tasks import extract_tasks
from agq_tvm.kernels import tunable
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.kernels.record_library import Library, open_library
from agq_tvm.progress import progress
from agq_tvm.targets import Device, load_device
from agq_tvm.tuning.candidate import export_candidate, make_candidate
from agq_tvm.tuning.display import Lines
from agq_tvm.tuning.local_measurer import LocalMeasurer, effort_here
from agq_tvm.tuning.runner import MeasuringRunner
from agq_tvm.tuning.task import Task, make_task
from agq_tvm.tuning.tuner import Settings, Tuner
from benchmarks.tables import RESULTS, aligned, report, write_report

TARGETS = ("host",)
ROWS = (1, 16, 128)
LEAST_GAIN, LEAST_SHARE = 1.10, 0.95
_CONTEXT = 2048
_SHAPE, _GROUP = (4096, 4096), 32
_LEAST_ROUNDS = 2


@dataclass(frozen=True)
class Comparison:
    """A kernel in two forms, measured in turns.

    Attributes
    ----------
    task : str
    default, tuned : float
        Seconds of one call, medians.
    ratio : float
        The first over the second: geometric mean over pairs of neighbours.
    low, high : float
        Its 95 % interval.
    """

    task: str
    default: float
    tuned: float
    ratio: float = 1.0
    low: float = 1.0
    high: float = 1.0

    @property
    def slower(self) -> bool:
        """Whether the tuned form is slower, beyond doubt."""
        return self.high < 1

    def cells(self) -> tuple[str, ...]:
        """Return a row of the table."""
        times = [f"{1e6 * seconds:.1f}" for seconds in (self.default, self.tuned)]
        return (self.task, *times, *(f"{value:.3f}" for value in (self.ratio, self.low, self.high)))


def compare(task: Task, decisions: dict[str, int], measurer: LocalMeasurer, rounds: int) -> Comparison:
    """Measure decisions in turns with the hand-made ones.

    Raises
    ------
    AgqError
        If one of them cannot be measured.
    """
    found: tuple[list[float], list[float]] = [], []
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{name}.so" for name in ("default", "tuned")]
        for path, point in zip(paths, (None, decisions), strict=True):
            export_candidate(make_candidate(task, point), task.device, path)
        for turn in range(rounds):
            for which in (0, 1) if turn % 2 == 0 else (1, 0):
                outcome = measurer.submit(str(paths[which])).result()
                if outcome.measurement is None:
                    raise AgqError(f"{task.name}, {paths[which].stem}: {outcome.message}")
                found[which].append(outcome.measurement.median)
    logs = [math.log(default / tuned) for default, tuned in zip(*found, strict=True)]
    error = stats.t.ppf(0.975, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    mean = statistics.fmean(logs)
    medians = [statistics.median(values) for values in found]
    return Comparison(task.name, *medians, *(math.exp(value) for value in (mean, mean - error, mean + error)))


def gains(tasks: Sequence[Task], library: Library, rounds: int) -> list[Comparison]:
    """Compare the best records of tasks with the hand-made decisions, which win some: these are not measured again."""
    found = []
    for task in progress(tasks, "measuring", unit="task"):
        best = library.best(task.name)
        if best is None:
            raise AgqError(f"the library has no record of {task.name}: run agq tune first")
        if best.decisions == tunable.space_of(task.kernel, task.instruction_set, task.threads).default:
            found.append(Comparison(task.name, best.time, best.time))
            continue
        measurer = LocalMeasurer(task, effort_here(repeats=5, milliseconds=10))
        try:
            found.append(compare(task, best.decisions, measurer, rounds))
        finally:
            measurer.close()
    return found


def tasks_of(checkpoint: str, device: Device, rows: Sequence[int]) -> list[Task]:
    """Return the tasks of a checkpoint's kernels of so many rows, products first."""
    tasks = [task for task in extract_tasks(checkpoint, device, _CONTEXT, "float16") if task.kernel.rows in rows]
    return sorted(tasks, key=lambda task: (not isinstance(task.kernel, LinearKernel), task.kernel.rows, task.name))


def _mean(found: Sequence[Comparison]) -> float:
    return math.exp(statistics.fmean(math.log(each.ratio) for each in found))


def _gains(arguments) -> tuple[dict, bool]:
    contents, met = {}, True
    for target in arguments.targets:
        device = load_device(target)
        tasks = tasks_of(arguments.checkpoint, device, arguments.rows)
        if not tasks:
            raise AgqError(f"{arguments.checkpoint} has no kernel of {arguments.rows} rows: see --rows")
        found = gains(tasks, open_library(device.name, arguments.library), arguments.rounds)
        products = found[: sum(isinstance(task.kernel, LinearKernel) for task in tasks)]
        mean, of_products = _mean(found), _mean(products) if products else None
        slower = [each.task for each in found if each.slower]
        rows = [("task", "default us", "tuned us", "ratio", "low", "high"), *(each.cells() for each in found)]
        alone = f", of products alone {of_products:.3f}" if products else ""
        print(
            f"{aligned(rows)}\n\n{device.name}: geometric mean {mean:.3f} (bound {LEAST_GAIN}){alone}; "
            f"slower: {len(slower)}\n"
        )
        met &= mean >= LEAST_GAIN and not slower
        means = {"mean": mean, "mean_products": of_products}
        contents[device.name] = {"threads": device.threads, **means, "rows": [asdict(each) for each in found]}
    return {"gains": contents}, met


def _search(arguments) -> tuple[dict, bool]:
    device = load_device("host")
    kernels = [LinearKernel(rows, *_SHAPE, 4, _GROUP, True, "float16", False) for rows in (1, 128)]
    tasks = [make_task(kernel, device.instruction_set, device, device.threads) for kernel in kernels]
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        library = open_library(device.name, folder)
        for task in tasks:
            settings = Settings(trials=arguments.trials, default=False)
            Tuner(library, [task], _runner, settings, Lines(meaningful=True)).run()
        seconds = time.monotonic() - begun
        found = gains(tasks, library, arguments.rounds)
    rows = [("task", "default us", "tuned us", "ratio", "low", "high"), *(each.cells() for each in found)]
    print(f"{aligned(rows)}\n\n{arguments.trials} trials each, {seconds:.0f} s; bound {LEAST_SHARE}")
    contents = {"trials": arguments.trials, "seconds": seconds, "rows": [asdict(each) for each in found]}
    return {"search": contents}, all(each.ratio >= LEAST_SHARE for each in found)


def _runner(task: Task) -> MeasuringRunner:
    return MeasuringRunner(LocalMeasurer(task, effort_here()))


def _pairs(text: str) -> int:
    count = int(text)
    if count < _LEAST_ROUNDS:
        raise argparse.ArgumentTypeError(f"an interval takes {_LEAST_ROUNDS} pairs or more")
    return count


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(required=True, metavar="gains|search")
    of_records = commands.add_parser("gains", help="tuned kernels beside the hand-made ones")
    of_records.add_argument("checkpoint", metavar="CKPT")
    of_records.add_argument(
        "--targets", type=names, default=TARGETS, metavar="NAME,…", help="default: host; or TOML files"
    )
    of_records.add_argument("--rows", type=numbers, default=ROWS, metavar="M,M,…", help="default: 1,16,128")
    of_records.add_argument("--library", metavar="DIR", help="default: that of `agq compile`")
    of_records.set_defaults(run=_gains, output=RESULTS / "tuning_gains.json")
    from_nothing = commands.add_parser("search", help="what the search finds without the hand-made schedule")
    from_nothing.add_argument("--trials", type=int, default=200, metavar="N", help="default: %(default)s")
    from_nothing.set_defaults(run=_search, output=RESULTS / "tuning_search.json")
    for each in (of_records, from_nothing):
        each.add_argument("--rounds", type=_pairs, default=10, metavar="N", help="pairs; default: %(default)s")
        each.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    try:
        contents, met = arguments.run(arguments)
    except AgqError as error:
        sys.exit(f"benchmarks.tuning: {error}")
    write_report(arguments.output, report("benchmarks.tuning", ("apache-tvm", "xgboost-cpu"), **contents))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
