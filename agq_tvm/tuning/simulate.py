"""Ranking candidates without a board: how often each block runs, counted under QEMU, times llvm-mca's cycles for it.

What it leaves out: caches and memory (every access hits the first level), loads that wait for stores, branch
prediction, the fetching of instructions, and what threads take from each other. So it ranks schedules of a product of
many rows, whose time is that of its instructions; of a product of one row, which waits for memory, it only ranks what
remains. Its seconds are cycles over the clock of the slowest core that takes part: a bound from below, no speed of a
real board.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from agq_tvm.errors import AgqError
from agq_tvm.kernels import tunable
from agq_tvm.targets import Device
from agq_tvm.tuning import block_counts, core_model
from agq_tvm.tuning.block_counts import KernelFailed
from agq_tvm.tuning.disassembly import disassemble, find_disassembler
from agq_tvm.tuning.helpers import MAIN, digest_name, fill_name
from agq_tvm.tuning.measure import CRASHED, FAILED, HUNG, WRONG, Argument, Measurement, disagreement
from agq_tvm.tuning.measurer import Measurer, Outcome
from agq_tvm.tuning.operands import Operand, operands_of
from agq_tvm.tuning.task import Task

TIMEOUT = 300.0
"""Seconds that a candidate may take under the emulator."""
_UNKNOWN_CLOCK = 1e9


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
    written : dict of int to array
        What the candidate wrote, by place among its operands; or the int64 digest of that.
    """

    instructions: int
    cycles: float
    covered: float
    core: str
    written: dict[int, np.ndarray]


def check_simulation(device: Device) -> None:
    """Find what simulating a device needs, so that what is missing is said before any work is done.

    Raises
    ------
    AgqError
        If the device cannot be emulated, there is no model of its core, or a tool is missing.
    """
    block_counts.emulator_command(device)
    core_model.core_of(device)
    core_model.find_simulator()
    find_disassembler(device)
    block_counts.prepare(device)


def simulate_candidate(
    library: str | os.PathLike,
    task: Task,
    core: str | None = None,
    digests: bool = True,
    timeout: float = TIMEOUT,
) -> Simulation:
    """Simulate one call of a candidate on its own operands.

    Parameters
    ----------
    library : path-like
        Of `agq_tvm.tuning.candidate`.
    task : Task
    core : str, optional
        LLVM's name of a core, instead of the device's.
    digests : bool, optional
        Whether digests are wanted of what the candidate writes; else all of it.
    timeout : float, optional
        Seconds for the emulator.

    Raises
    ------
    KernelFailed
        If the candidate does not end, or fails.
    AgqError
        If a tool is missing.
    """
    operands = _operands(task)
    written = [place for place, operand in enumerate(operands) if operand.role in ("output", "updated")]
    tensors = [f"~{operand.dtype}:{'x'.join(map(str, operand.shape))}" for operand in operands]
    calls = [f"{fill_name(place)}:{place}" for place in range(len(operands))]
    calls.append(f"@{MAIN}:{','.join(map(str, range(len(operands))))}")
    if digests:
        calls += [f"{digest_name(place)}:{place},{len(tensors) + number}" for number, place in enumerate(written)]
    calls += [f"={len(tensors) + number if digests else place}" for number, place in enumerate(written)]
    tensors += ["~int64:1"] * len(written) if digests else []
    path = Path(library)
    count, read = block_counts.count_calls(path, tensors, calls, task.device, task.threads, timeout)
    cycles = core_model.simulate(disassemble(path, task.device), count, task.device, core)
    arrays = {
        place: np.frombuffer(data, "int64" if digests else operands[place].dtype)
        for place, data in zip(written, read, strict=True)
    }
    return Simulation(count.instructions, cycles.cycles / cycles.covered, cycles.covered, cycles.core, arrays)


def seconds_of(simulation: Simulation, task: Task) -> float:
    """Return the seconds of a simulated call by the clock of the slowest core in use; by 1 GHz if it is not known."""
    return simulation.cycles / (task.device.clock(task.threads) or _UNKNOWN_CLOCK)


@cache
def _operands(task: Task) -> list[Operand]:
    return operands_of(task.kernel, tunable.build(task.kernel, task.instruction_set))


class SimulatedMeasurer(Measurer):
    """Simulates candidates of one task. One gives the same seconds every time; its results are checked, as on a board.

    Parameters
    ----------
    task : Task
    timeout : float, optional
        Seconds for a candidate under the emulator.
    parallel : int, optional
        Candidates at a time; by default as many as this process has processors.

    Raises
    ------
    AgqError
        If the device cannot be simulated here: the sentence says what is missing.
    """

    def __init__(self, task: Task, timeout: float = TIMEOUT, parallel: int | None = None) -> None:
        check_simulation(task.device)
        super().__init__(task, timeout, parallel or len(os.sched_getaffinity(0)))
        _operands(task)  # TVM is not asked by several threads

    def _save(self, path: str, arguments: list[Argument], files: Mapping[int, Path]) -> None:
        written = simulate_candidate(path, self.task, digests=False, timeout=self.timeout).written
        for place, file in files.items():
            np.save(file, written[place])

    def _measure(self, path: str) -> Outcome:
        digests = all(argument.digest is not None for argument in self.arguments() if argument.written)
        try:
            simulation = simulate_candidate(path, self.task, None, digests, self.timeout)
        except KernelFailed as error:
            kind = HUNG if error.late else CRASHED if error.crashed else FAILED
            return Outcome(kind=kind, text=str(error))
        except AgqError as error:  # code that the core model cannot read
            return Outcome(kind=FAILED, text=str(error))
        wrong = self._wrong(simulation, digests)
        if wrong:
            return Outcome(kind=WRONG, text=wrong)
        seconds = [seconds_of(simulation, self.task)]
        status = {"simulated": {"core": simulation.core, "instructions": simulation.instructions}}
        return Outcome(Measurement(seconds, status=status))

    def _wrong(self, simulation: Simulation, digests: bool) -> str | None:
        """Say which argument differs from the reference."""
        for place, array in simulation.written.items():
            argument = self.arguments()[place]
            if digests:
                difference = None if int(array[0]) == argument.digest else "its digest is another"
            else:
                difference = disagreement(array, np.load(argument.reference).reshape(-1))
            if difference:
                return f"argument {place} differs from the reference: {difference}"
        return None
