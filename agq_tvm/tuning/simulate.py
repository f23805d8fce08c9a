"""Ranking candidates without a board: how often each block runs, counted under QEMU, times llvm-mca's cycles for it.

What it leaves out: caches and memory (every access hits the first level), loads that wait for stores, branch
prediction, the fetching of instructions, and what threads take from each other. So it ranks schedules of a product of
many rows, whose time is that of its instructions; of a product of one row, which waits for memory, it only ranks what
remains. Its seconds are cycles over the device's highest clock: a bound from below, no speed of a real board.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from tvm.ir.utils import derived_object
from tvm.s_tir.meta_schedule.runner import PyRunner, PyRunnerFuture, RunnerInput, RunnerResult

from agq_tvm.errors import AgqError
from agq_tvm.kernels import tunable
from agq_tvm.tuning import block_counts, core_model
from agq_tvm.tuning.candidate import MAIN, export_candidate, fill_name, make_candidate
from agq_tvm.tuning.disassembly import disassemble, find_disassembler
from agq_tvm.tuning.operands import Operand, operands_of
from agq_tvm.tuning.task import Task

HOW = "simulated"
"""What records of it are marked with."""
TIME_LIMIT = 300.0
"""Seconds for one candidate, unless told otherwise."""
_UNKNOWN_CLOCK = 1e9
_TOLERANCE = 1e-4
_MOST_TIES = 1e-3


@dataclass(frozen=True)
class Simulation:
    """What simulating a call of a candidate gave.

    Attributes
    ----------
    instructions : int
        Executed by the first of the threads, which has most to do.
    cycles : float
        For them, with those not simulated taken for as fast as the others.
    covered : float
        The part of the instructions that was simulated.
    core : str
        LLVM's name of the core model.
    outputs : list[np.ndarray]
        What the candidate wrote, in the order of its operands.
    """

    instructions: int
    cycles: float
    covered: float
    core: str
    outputs: list[np.ndarray]


def check_simulation(task: Task) -> None:
    """Find what simulating a task needs, so that what is missing is said before the first candidate.

    Raises
    ------
    AgqError
        If the device cannot be emulated, there is no model of its core, or a tool is missing.
    """
    core_model.core_of(task.device)
    core_model.find_simulator()
    find_disassembler(task.device)
    block_counts.prepare(task.device)


def simulate_candidate(
    library: Path, task: Task, core: str | None = None, time_limit: float = TIME_LIMIT
) -> Simulation:
    """Simulate one call of a candidate on its own operands.

    Parameters
    ----------
    library : Path
        Of `agq_tvm.tuning.candidate`.
    task : Task
    core : str, optional
        LLVM's name of a core, instead of the device's.
    time_limit : float, optional
        Seconds of the emulator.

    Raises
    ------
    AgqError
        If a tool is missing, or the candidate does not end or fails.
    """
    operands = _operands(task)
    written = [place for place, operand in enumerate(operands) if operand.role in ("output", "updated")]
    calls = [f"{fill_name(place)}:{place}" for place in range(len(operands))]
    calls += [f"@{MAIN}:{','.join(map(str, range(len(operands))))}", *(f"={place}" for place in written)]
    tensors = [f"~{operand.dtype}:{'x'.join(map(str, operand.shape))}" for operand in operands]
    count, read = block_counts.count_calls(library, tensors, calls, task.device, task.threads, time_limit)
    cycles = core_model.simulate(disassemble(library, task.device), count, task.device, core)
    outputs = [
        np.frombuffer(data, operands[place].dtype).reshape(operands[place].shape)
        for place, data in zip(written, read, strict=True)
    ]
    return Simulation(count.instructions, cycles.cycles / cycles.covered, cycles.covered, cycles.core, outputs)


def seconds_of(simulation: Simulation, task: Task) -> float:
    """Return the seconds of a simulated call at the device's highest clock; 1 GHz if that is not known."""
    return simulation.cycles / (task.device.clock(task.threads) or _UNKNOWN_CLOCK)


def differences(task: Task, outputs: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> str | None:
    """Say how outputs differ from those expected more than the order of a sum explains; None if they do not.

    Products of integers are exact in any order, on the operands that candidates make: they must be the same bit for
    bit. Elsewhere floats may differ in the last places, and a few codes by one.
    """
    exact = hasattr(task.kernel, "columns") and hasattr(task.kernel, "activation_bits")
    for output, right in zip(outputs, expected, strict=True):
        if exact and output.tobytes() == right.tobytes():
            continue
        distance = np.abs(output.astype("float64") - right.astype("float64"))
        wrong = ~(distance <= _allowed(right, exact))
        if np.mean(wrong) > (0 if exact or right.dtype.kind == "f" else _MOST_TIES) or (distance[wrong] > 1).any():
            return f"{int(wrong.sum())} of {right.size} results are wrong, the first at {int(np.argmax(wrong))}"
    return None


def _allowed(right: np.ndarray, exact: bool) -> float:
    return _TOLERANCE * float(np.abs(right).max(initial=0)) if right.dtype.kind == "f" and not exact else 0.0


@cache
def _operands(task: Task) -> list[Operand]:
    return operands_of(task.kernel, tunable.build(task.kernel, task.instruction_set))


@derived_object
class _Ready(PyRunnerFuture):
    """What a candidate gave."""

    def __init__(self, result: RunnerResult):
        super().__init__()
        self._result = result

    def done(self) -> bool:
        """Return true: candidates are simulated when they are handed over."""
        return True

    def result(self) -> RunnerResult:
        """Return it."""
        return self._result


@derived_object
class SimulatedRunner(PyRunner):
    """A runner of MetaSchedule that simulates candidates; a candidate gives the same seconds every time.

    Parameters
    ----------
    task : Task
    time_limit : float, optional
        Seconds of the emulator for one candidate.
    core : str, optional
        LLVM's name of a core, instead of the device's.

    Raises
    ------
    AgqError
        If the device cannot be simulated here; the sentence says what is missing.
    """

    how = HOW

    def __init__(self, task: Task, time_limit: float = TIME_LIMIT, core: str | None = None):
        super().__init__()
        if core is None:
            check_simulation(task)
        self._task, self._time_limit, self._core = task, time_limit, core
        self._expected = self._simulate_default()

    def run(self, runner_inputs: list[RunnerInput]) -> list[PyRunnerFuture]:
        """Simulate candidates, one after the other."""
        return [_Ready(self._result(Path(one.artifact_path))) for one in runner_inputs]

    def _result(self, library: Path) -> RunnerResult:
        try:
            simulation = simulate_candidate(library, self._task, self._core, self._time_limit)
        except AgqError as error:
            return RunnerResult(None, str(error))
        wrong = differences(self._task, simulation.outputs, self._expected)
        return RunnerResult(None, wrong) if wrong else RunnerResult([seconds_of(simulation, self._task)], None)

    def _simulate_default(self) -> list[np.ndarray]:
        """Return what the default gives, which candidates are compared with."""
        with tempfile.TemporaryDirectory(prefix="agq-default-") as scratch:
            library = Path(scratch) / "default.so"
            export_candidate(make_candidate(self._task, None), self._task.device, library)
            return simulate_candidate(library, self._task, self._core, self._time_limit).outputs
