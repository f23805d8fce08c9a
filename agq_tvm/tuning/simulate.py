"""Ranking candidates without a board: how often each block runs, counted under QEMU, times llvm-mca's cycles for it.

What it leaves out: caches and memory (every access hits the first level), loads that wait for stores, branch
prediction, the fetching of instructions, and what threads take from each other. So it ranks schedules of a product of
many rows, whose time is that of its instructions; of a product of one row, which waits for memory, it only ranks what
remains. Its seconds are cycles over the device's highest clock: a bound from below, no speed of a real board.
"""

import os
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from tvm.ir.utils import derived_object

from agq_tvm.errors import AgqError
from agq_tvm.kernels import tunable
from agq_tvm.kernels.record import SIMULATED
from agq_tvm.targets import Device
from agq_tvm.tuning import block_counts, core_model
from agq_tvm.tuning.block_counts import KernelFailed
from agq_tvm.tuning.candidate import MAIN, digest_name, export_candidate, fill_name, make_candidate
from agq_tvm.tuning.disassembly import disassemble, find_disassembler
from agq_tvm.tuning.measure import CRASHED, FAILED, HUNG, WRONG, Argument, Measurement, disagreement
from agq_tvm.tuning.measurer import Outcome
from agq_tvm.tuning.operands import Operand, digest, operands_of
from agq_tvm.tuning.reference import arguments_of, is_exact
from agq_tvm.tuning.runner import MeasuringRunner
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
    """Return the seconds of a simulated call at the device's highest clock; at 1 GHz if that is not known."""
    return simulation.cycles / (task.device.clock(task.threads) or _UNKNOWN_CLOCK)


@cache
def _operands(task: Task) -> list[Operand]:
    return operands_of(task.kernel, tunable.build(task.kernel, task.instruction_set))


class SimulatedMeasurer:
    """Simulates candidates of one task; what it has in common with `agq_tvm.tuning.measurer.Measurer` means the same.

    A candidate gives the same seconds every time. Its results are checked, as on a board.

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

    how = SIMULATED

    def __init__(self, task: Task, timeout: float = TIMEOUT, parallel: int | None = None) -> None:
        check_simulation(task.device)
        self.task, self.timeout = task, timeout
        _operands(task)  # TVM is not asked by several threads
        self._executor = ThreadPoolExecutor(parallel or len(os.sched_getaffinity(0)), thread_name_prefix="simulate")
        self._arguments: list[Argument] | None = None
        self._scratch = tempfile.TemporaryDirectory(prefix="agq-simulate-")

    def submit(self, path: str) -> "Future[Outcome]":
        """Have a candidate's library simulated."""
        self.arguments()
        return self._executor.submit(self._simulate, str(path))

    def close(self) -> None:
        """End; what waits is not simulated any more."""
        self._executor.shutdown(cancel_futures=True)
        self._scratch.cleanup()

    def __enter__(self) -> "SimulatedMeasurer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def arguments(self) -> list[Argument]:
        """Return the kernel's arguments with what it must write: numpy's results, or those of the hand-made kernel.

        Raises
        ------
        AgqError
            If the hand-made kernel does not run.
        """
        if self._arguments is None:
            arguments = arguments_of(self.task)
            if any(argument.written and argument.digest is None for argument in arguments):
                arguments = self._by_default()
            self._arguments = arguments
        return self._arguments

    def _by_default(self) -> list[Argument]:
        scratch = Path(self._scratch.name)
        library = scratch / "default.so"
        export_candidate(make_candidate(self.task, None), self.task.device, library)
        written = simulate_candidate(library, self.task, digests=False, timeout=self.timeout).written
        if is_exact(self.task):
            return arguments_of(self.task, {place: digest(array) for place, array in written.items()})
        files = {place: scratch / f"reference-{place}.npy" for place in written}
        for place, array in written.items():
            np.save(files[place], array)
        return arguments_of(self.task, {}, files)

    def _simulate(self, path: str) -> Outcome:
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


@derived_object
class SimulatedRunner(MeasuringRunner):
    """MetaSchedule's runner for a device that one does not have, see `SimulatedMeasurer`.

    Parameters
    ----------
    task : Task
    timeout : float, optional
        Seconds for a candidate under the emulator.
    """

    def __init__(self, task: Task, timeout: float = TIMEOUT) -> None:
        super().__init__(SimulatedMeasurer(task, timeout))
