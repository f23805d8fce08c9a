"""How well simulation ranks candidates: its rank correlation with real time, and between its own two halves.

    python -m benchmarks.simulated [--candidates N] [--rounds N] [--only x86|arm]

Each product's candidates are points of its design space. On x86 they are simulated with the model of this machine's
core and timed on one thread, all of them in turn, round after round, the least of the rounds counting: what else the
machine does only ever adds time. On Arm, where there is nothing to time, plain counts of instructions are held
against counts times the cycles of the core model. The last x86 product is larger than the caches, and there to show
what simulation leaves out: caches and memory, loads that wait for stores, branch prediction, threads.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from agq_tvm.errors import AgqError
from agq_tvm.kernels import tunable
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.kernels.space import Space
from agq_tvm.progress import progress, say
from agq_tvm.runtime.threads import Threads
from agq_tvm.targets import load_device
from agq_tvm.tuning import core_model
from agq_tvm.tuning.candidate import export_candidate, make_candidate
from agq_tvm.tuning.helpers import MAIN
from agq_tvm.tuning.operands import operands_of
from agq_tvm.tuning.simulate import check_simulation, simulate_candidate
from agq_tvm.tuning.task import Task, make_task
from agq_tvm.tvm_seam import tvm
from benchmarks.tables import RESULTS, aligned, report, write_report

X86_DEVICE = "x86-64-avx2"
ARM_DEVICES = ("raspberry-pi-4", "raspberry-pi-5")
"""The Snapdragon 870 has the core model and the instructions of the Raspberry Pi 5."""
X86_PRODUCTS = ((1, 1536, 576, 4), (16, 1536, 576, 4), (128, 576, 576, 4), (1, 4096, 4096, 4))
"""M, N, K and bits: SmolLM2's gate or up, its q or o, and one of LLaMA-7B."""
ARM_PRODUCTS = ((1, 1536, 576, 4), (16, 1536, 576, 4), (16, 1536, 576, 8))
"""Several rows of 4-bit weights have loops in assembly, about which there is less to decide."""
_HEAD = ("device", "product", "core", "candidates", "compared", "Spearman", "Kendall", "first", "default", "worst")
_WARM = 3


@dataclass(frozen=True)
class Candidate:
    """Figures of one point of a design space; `seconds` is None where nothing is timed."""

    decisions: dict[str, int]
    instructions: int
    cycles: float
    seconds: float | None = None


@dataclass(frozen=True)
class Comparison:
    """How two figures of the same candidates rank them.

    Attributes
    ----------
    what : str
        E.g. ``"cycles with time"``.
    spearman, kendall : float
        From -1 to 1; the latter is tau-b.
    regret : float
        The candidate that the first figure puts first, by the second figure, over the best by that.
    default : float
        The hand-made candidate by the second figure, over the best.
    worst : float
        The worst by the second figure, over the best.
    """

    what: str
    spearman: float
    kendall: float
    regret: float
    default: float
    worst: float


def ranks(values: Sequence[float]) -> np.ndarray:
    """Return ranks from 0; equal values share the mean of theirs.

    Examples
    --------
    >>> ranks([3.0, 1.0, 3.0]).tolist()
    [1.5, 0.0, 1.5]
    """
    values = np.asarray(values)
    return (values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1) - 1) / 2


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Return the correlation of the ranks; nan if all values of one side are equal."""
    left, right = (ranks(side) - ranks(side).mean() for side in (left, right))
    scale = np.sqrt((left**2).sum() * (right**2).sum())
    return float((left * right).sum() / scale) if scale else float("nan")


def kendall(left: Sequence[float], right: Sequence[float]) -> float:
    """Return tau-b: pairs in the same order less those in the other; nan if all values of one side are equal."""
    left, right = (np.sign(np.subtract.outer(side, side)) for side in (left, right))
    scale = np.sqrt((left**2).sum() * (right**2).sum())
    return float((left * right).sum() / scale) if scale else float("nan")


def compare(what: str, ranking: Sequence[float], truth: Sequence[float]) -> Comparison:
    """Compare how two figures rank the same candidates, the first of which is the hand-made one."""
    best, chosen = min(truth), truth[int(np.argmin(ranking))]
    ratios = (chosen / best, truth[0] / best, max(truth) / best)
    return Comparison(what, spearman(ranking, truth), kendall(ranking, truth), *ratios)


def sample(space: Space, most: int) -> list[dict[str, int]]:
    """Return at most so many points of a space: the default, then the same ones each time out of all others."""
    others = [point for point in space.points() if point != space.default]
    order = np.random.default_rng(0).permutation(len(others))[: most - 1]
    return [space.default, *(others[place] for place in order)]


def simulate(task: Task, most: int, core: str | None, folder: Path) -> list[tuple[Candidate, Path]]:
    """Build and simulate candidates of a task."""
    points = sample(tunable.space_of(task.kernel, task.instruction_set, task.threads), most)
    found = []
    for number, decisions in enumerate(progress(points, task.kernel.name, unit="candidate")):
        library = folder / f"{number}.so"
        try:
            export_candidate(make_candidate(task, decisions), task.device, library)
        except Exception as error:  # whatever TVM or LLVM refuses: the tuner records it as a failure
            say(f"{task.kernel.name}, {decisions}: {str(error).strip().splitlines()[-1]}")
            continue
        simulated = simulate_candidate(library, task, core)
        found.append((Candidate(decisions, simulated.instructions, simulated.cycles), library))
    return found


def timed(task: Task, found: list[tuple[Candidate, Path]], rounds: int) -> list[Candidate]:
    """Time candidates on this machine, in turn, and return them with the least seconds of a call."""
    operands = operands_of(task.kernel, tunable.build(task.kernel, task.instruction_set))
    tensors = [tvm.runtime.tensor(operand.array()) for operand in operands]
    modules = [tvm.runtime.load_module(str(library)) for _, library in found]
    calls = [module[MAIN] for module in modules]
    least = [float("inf")] * len(calls)
    with Threads(1).running():
        for _ in range(rounds):
            for place, call in enumerate(calls):
                for repeat in range(2 * _WARM):
                    start = time.perf_counter()
                    call(*tensors)
                    if repeat >= _WARM:
                        least[place] = min(least[place], time.perf_counter() - start)
    return [
        Candidate(one.decisions, one.instructions, one.cycles, seconds)
        for (one, _), seconds in zip(found, least, strict=True)
    ]


def comparisons(candidates: list[Candidate]) -> list[Comparison]:
    """Return the rank correlations that candidates allow."""
    instructions = [one.instructions for one in candidates]
    cycles = [one.cycles for one in candidates]
    found = [compare("instructions with cycles", instructions, cycles)]
    if candidates[0].seconds is not None:
        seconds = [one.seconds for one in candidates]
        found += [
            compare("instructions with time", instructions, seconds),
            compare("cycles with time", cycles, seconds),
        ]
    return found


def tasks(device: str, products: Sequence[tuple[int, int, int, int]]) -> list[Task]:
    """Return tasks of a device: products with weights in groups of 32, one thread."""
    target, found = load_device(device), []
    for rows, columns, channels, bits in products:
        kernel = LinearKernel(rows, columns, channels, bits, 32, True, "float16" if bits == 4 else None, False)
        found.append(make_task(kernel, target.instruction_set, target, 1))
    return found


def host_core() -> str:
    """Return LLVM's name of this machine's core."""
    return tvm.get_global_func("target.llvm_get_system_cpu")()


def _measure(task: Task, arguments, core: str | None) -> dict:
    with tempfile.TemporaryDirectory(prefix="agq-simulated-") as folder:
        found = simulate(task, arguments.candidates, core, Path(folder))
        real = task.device.name == X86_DEVICE
        candidates = timed(task, found, arguments.rounds) if real else [one for one, _ in found]
    return {
        "device": task.device.name,
        "kernel": task.kernel.name,
        "core": core or core_model.core_of(task.device),
        "comparisons": [asdict(one) for one in comparisons(candidates)],
        "candidates": [asdict(one) for one in candidates],
    }


def _lines(result: dict) -> list[tuple[str, ...]]:
    product = (result["device"], result["kernel"], result["core"], str(len(result["candidates"])))
    return [
        (*product, one["what"], *(f"{one[key]:.2f}" for key in ("spearman", "kendall", "regret", "default", "worst")))
        for one in result["comparisons"]
    ]


def main() -> None:
    """Simulate, time, print and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulated", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS / "simulated.json", metavar="FILE")
    parser.add_argument("--candidates", type=int, default=40, metavar="N", help="of a product at most; default: 40")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="of timing; default: 20")
    parser.add_argument("--only", choices=("x86", "arm"))
    arguments = parser.parse_args()
    chosen = []
    if arguments.only != "arm":
        chosen += [(task, host_core()) for task in tasks(X86_DEVICE, X86_PRODUCTS)]
    if arguments.only != "x86":
        chosen += [(task, None) for device in ARM_DEVICES for task in tasks(device, ARM_PRODUCTS)]
    for device in dict.fromkeys(task.device for task, _ in chosen):
        check_simulation(device)
    results = []
    for task, core in chosen:
        results.append(_measure(task, arguments, core))
        say("\n".join(map("  ".join, _lines(results[-1]))))
    print(aligned([_HEAD, *(line for result in results for line in _lines(result))]))
    simulator = core_model.find_simulator()[1]
    contents = report("benchmarks.simulated", ("apache-tvm", "ziglang"), llvm_mca=simulator, results=results)
    write_report(arguments.json, contents)


if __name__ == "__main__":
    try:
        main()
    except AgqError as error:
        sys.exit(f"benchmarks.simulated: {error}")
