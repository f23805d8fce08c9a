"""Simulated candidates: exact counts, cycles that rank, results that are checked, and what is missing said in words."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tvm import te
from tvm.s_tir.meta_schedule.runner import RunnerInput

from agq_tvm.errors import AgqError
from agq_tvm.flow.tune import TuneRequest, tune
from agq_tvm.kernels import tunable
from agq_tvm.kernels.attrs import describe
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.kernels.record import SIMULATED, Record
from agq_tvm.kernels.record_library import Library
from agq_tvm.targets import load_device
from agq_tvm.tuning import block_counts, core_model, simulate
from agq_tvm.tuning import measurer as measurer_module
from agq_tvm.tuning.block_counts import Count, KernelFailed, count_calls
from agq_tvm.tuning.candidate import export_candidate, make_candidate
from agq_tvm.tuning.disassembly import Instruction, disassemble, regions
from agq_tvm.tuning.measure import CRASHED, FAILED, HUNG, WRONG
from agq_tvm.tuning.operands import Operand
from agq_tvm.tuning.reference import arguments_of
from agq_tvm.tuning.runner import MeasuringRunner
from agq_tvm.tuning.simulate import SimulatedMeasurer, check_simulation, simulate_candidate
from agq_tvm.tuning.task import make_task
from agq_tvm.tvm_seam import T
from benchmarks.instructions.products import compile_library
from tests.missing import leave_out
from tests.tuning import candidates

pytestmark = pytest.mark.emulator

ARM, X86 = "raspberry-pi-5", "x86-64-avx2"


def task_of(device: str, threads: int = 1, rows: int = 8, columns: int = 64, channels: int = 128):
    """Return the task of a small product, or skip (in CI fail) where it cannot be simulated."""
    target = load_device(device)
    kernel = LinearKernel(rows, columns, channels, 8, 32, True, None, False)
    task = make_task(kernel, target.instruction_set, target, threads)
    try:
        check_simulation(task.device)
    except AgqError as error:
        leave_out("simulation", error)
    return task


def library_of(task, folder: Path, decisions=None) -> Path:
    path = folder / "candidate.so"
    export_candidate(make_candidate(task, decisions), task.device, path)
    return path


@pytest.mark.parametrize("device", [ARM, X86])
def test_a_candidate_gives_the_same_figures_every_time(device, tmp_path):
    task = task_of(device)
    library = library_of(task, tmp_path)
    first, second = (simulate_candidate(library, task) for _ in range(2))
    assert first.instructions == second.instructions and first.cycles == second.cycles
    assert first.core == core_model.CORES[task.device.cpu] and first.covered > 0.9
    macs = task.kernel.rows * task.kernel.columns * task.kernel.channels
    assert macs / 64 < first.instructions < macs  # no instruction multiplies more than 64 bytes


@pytest.mark.parametrize("device", [ARM, X86])
def test_more_work_takes_as_much_longer(device, tmp_path):
    small, large = (task_of(device, columns=columns) for columns in (64, 256))
    times = [simulate_candidate(library_of(task, tmp_path), task).cycles for task in (small, large)]
    assert 3 < times[1] / times[0] < 5


def chain(rounds: int):
    """Return a function with a chain of `rounds` divisions of floats for each of 64: few instructions, many cycles."""
    x = te.placeholder((64,), "float32", name="x")

    def divided(i):
        value = x[i]
        for _ in range(rounds):
            value = T.float32(1) / (value + T.float32(1))
        return value

    return te.create_prim_func([x, te.compute((64,), divided, name="out")])


def figures(function, device: str, folder: Path) -> tuple[int, float]:
    """Return instructions and cycles of a function of two tensors of 64 floats."""
    target = load_device(device)
    library = compile_library({"chain": function}, target, folder / "chain.so")
    count, _ = count_calls(library, ["float32:64"] * 2, ["@chain:0,1"], target)
    return count.instructions, core_model.simulate(disassemble(library, target), count, target).cycles


def test_what_is_known_to_be_better_ranks_better(tmp_path):
    """A product by `sdot` before the same one by `smlal`; and chains of divisions take long for few instructions."""
    task = task_of(ARM, rows=16)
    cycles = {}
    for name in ("dotprod", "neon"):
        other = replace(task, isa=name)
        simulated = simulate_candidate(library_of(other, tmp_path), other)
        cycles[name] = simulated.cycles, simulated.cycles / simulated.instructions
    instructions, divisions = figures(chain(30), ARM, tmp_path)
    assert 1.5 * cycles["dotprod"][0] < cycles["neon"][0]
    assert divisions / instructions > 3 * max(each for _, each in cycles.values())


@pytest.mark.parametrize("device", [ARM, X86])
def test_threads_share_the_work_and_the_first_has_most(device, tmp_path):
    tasks = [task_of(device, threads, columns=192) for threads in (1, 2, 4)]
    library = library_of(tasks[0], tmp_path)
    one, two, four = (simulate_candidate(library, task) for task in tasks)
    assert four.instructions < two.instructions < one.instructions < 2.2 * two.instructions
    assert one.written[len(simulate._operands(tasks[0])) - 1] == four.written[len(simulate._operands(tasks[0])) - 1]


def test_blocks_are_those_of_the_listing(tmp_path):
    """On x86 as well, where instructions have all lengths and QEMU's blocks end at pages."""
    task = task_of(X86)
    library = library_of(task, tmp_path)
    operands = simulate._operands(task)
    tensors = [f"{operand.dtype}:{'x'.join(map(str, operand.shape))}" for operand in operands]
    call = f"@main:{','.join(map(str, range(len(operands))))}"
    count, _ = count_calls(library, tensors, [call], task.device)
    found = regions(disassemble(library, task.device), count)
    executed = sum(region.executed for region in found)
    assert 0.98 * count.instructions <= executed <= count.instructions


def test_an_instruction_on_two_pages_counts_once():
    """QEMU counts the third of this loop's instructions for two blocks."""
    addresses = (4080, 4086, 4092, 4098, 4100)
    listing = {at: Instruction(at, "add", "", None) for at in addresses}
    listing[4098] = Instruction(4098, "jne", "", 4080)
    (loop,) = regions(listing, Count(0, {4080: (3, 7), 4092: (2, 7)}))
    assert [one.address for one in loop.instructions] == [4080, 4086, 4092, 4098] and loop.runs == 7


def test_code_that_the_core_model_cannot_read_is_a_failure(tmp_path, monkeypatch):
    task = task_of(ARM)

    def refuse(*_):
        raise AgqError("llvm-mca failed: invalid instruction")

    with SimulatedMeasurer(task) as measurer:
        monkeypatch.setattr(core_model, "simulate", refuse)
        outcome = measurer.submit(str(library_of(task, tmp_path))).result()
    assert outcome.kind == FAILED and "invalid instruction" in outcome.text


def test_a_runner_of_metaschedule_gives_seconds(tmp_path):
    task = task_of(ARM)
    one = RunnerInput(str(library_of(task, tmp_path)), "cpu", [])
    runner = MeasuringRunner(SimulatedMeasurer(task))
    try:
        first, second = (future.result() for future in [*runner.run([one]), *runner.run([one])])
        assert first.error_msg is None and second.error_msg is None
        cycles = simulate_candidate(one.artifact_path, task).cycles
        assert float(first.run_secs[0]) == float(second.run_secs[0]) == pytest.approx(cycles / 2.4e9)
        outcome = runner.outcomes[str(one.artifact_path)].result()
        assert outcome.measurement.status[SIMULATED]["core"] == "neoverse-n1"
    finally:
        runner.close()


def without_numpy(task, digests=None, files=None):
    """List arguments as `arguments_of` does, with no digest from numpy."""
    return arguments_of(task, digests or {}, files)


def test_without_a_digest_the_hand_made_kernel_is_the_reference(tmp_path, monkeypatch):
    """What numpy has no digest of is compared with what the default writes, under emulation as well."""
    task = task_of(ARM)
    monkeypatch.setattr(measurer_module, "arguments_of", without_numpy)
    for exact in (True, False):
        monkeypatch.setattr(measurer_module, "is_exact", lambda task, exact=exact: exact)
        with SimulatedMeasurer(task) as measurer:
            (expected,) = (each for each in measurer.arguments() if each.written)
            assert (expected.reference is None) == exact == (expected.digest is not None)
            library = str(library_of(task, tmp_path))
            assert measurer.submit(library).result().measurement
            measurer._arguments = [
                replace(each, digest=each.digest and each.digest + 1) for each in measurer._arguments
            ]
            if not exact:
                np.save(expected.reference, np.load(expected.reference) * 1.01)
            assert measurer.submit(library).result().kind == WRONG


@pytest.mark.parametrize(
    ("behaviour", "kind", "words"),
    [
        ("right", "", ""),
        ("wrong", WRONG, "argument 1 differs"),
        ("endless", HUNG, "within 2 s"),
        ("out of bounds", CRASHED, "does not run"),
        ("illegal", CRASHED, "does not run"),
        ("exits", FAILED, "code 7"),
        ("fails", FAILED, "this is refused"),
    ],
)
def test_what_becomes_of_a_candidate_is_told(behaviour, kind, words, tmp_path, monkeypatch):
    task = candidates.task_for(task_of(ARM).device)
    operands = [Operand("x", (64,), "int8", "cold", None, 0), Operand("y", (64,), "int8", "output", None, 1)]
    monkeypatch.setattr(simulate, "_operands", lambda task: operands)
    monkeypatch.setattr(measurer_module, "arguments_of", lambda task: candidates.ARGUMENTS)
    timeout = 2.0 if behaviour == "endless" else 60.0
    with SimulatedMeasurer(task, timeout) as measurer:
        path = candidates.candidate(behaviour, task.device, tmp_path)
        outcome = measurer.submit(path).result()
    assert outcome.kind == kind and words in outcome.text
    assert (outcome.measurement is None) == bool(kind)


def test_a_checkpoint_is_tuned_without_a_board(tiny_checkpoint, tmp_path, capsys):
    task_of(ARM)
    request = TuneRequest(str(tiny_checkpoint), ARM, 3, simulate=True, only="m1_n96_k160", strategy="random")
    result = tune(replace(request, library=str(tmp_path)))
    (task,) = result["tasks"]
    assert (result["how"], task["trials"], task["failures"]) == (SIMULATED, 3, 0)
    records = Library(tmp_path, device=ARM).of_task(task["task"])
    assert [record.how for record in records] == [SIMULATED] * 3 and not any(record.confirmed for record in records)
    times = [record.time for record in records]
    assert len(set(times)) > 1 and task["best"] == min(times) and task["default"] in times
    assert "simulated times leave out caches and memory" in capsys.readouterr().err


def test_what_is_no_library_is_told(tmp_path):
    path = tmp_path / "no.so"
    path.write_bytes(b"no library")
    with pytest.raises(KernelFailed, match="does not load"):
        simulate_candidate(path, task_of(ARM))


def test_simulated_records_lose_to_measured_ones(tmp_path):
    task = task_of(ARM)
    kernel = describe(task.kernel)
    library = Library(tmp_path, device=task.device.name)
    point = tunable.space_of(task.kernel, task.instruction_set).default
    for how, seconds in (("measured", 9.0), (SIMULATED, 1.0)):
        record = Record(task.name, kernel, task.isa, point, (seconds,), None, how)
        assert library.append(record)
    assert library.best(task.name).how == "measured"


@pytest.mark.parametrize("tool", ["qemu-aarch64", "llvm-mca", "aarch64-linux-gnu-objdump"])
def test_a_missing_tool_is_named(tool, monkeypatch):
    task, real = task_of(ARM), shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name.startswith(tool) else real(name))
    block_counts.emulator_command.cache_clear()
    core_model.find_simulator.cache_clear()
    try:
        with pytest.raises(AgqError, match=rf"{tool}.*apt-get install") as caught:
            SimulatedMeasurer(task)
        assert "\n" not in str(caught.value)
    finally:
        block_counts.emulator_command.cache_clear()
        core_model.find_simulator.cache_clear()


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("x86-64-avx512vnni", "does not run avx512vnni.*--local"),
        ("generic-aarch64", "no core model for generic.*cortex-a72.*--target.*--tracker"),
    ],
)
def test_devices_that_cannot_be_simulated_are_refused(device, words):
    with pytest.raises(AgqError, match=words):
        check_simulation(load_device(device))


def test_the_x2_multiplies_matrices_at_the_width_it_has(tmp_path):
    """Four vector units: more products in a cycle than the two of an A76 can make by `sdot`."""
    products = {}
    for device in ("snapdragon-8-gen-1", ARM):
        task = task_of(device, rows=16)
        simulated = simulate_candidate(library_of(task, tmp_path), task)
        assert simulated.covered > 0.9
        products[device] = task.kernel.rows * task.kernel.columns * task.kernel.channels / simulated.cycles
    assert products[ARM] < 32 and products["snapdragon-8-gen-1"] > 1.5 * products[ARM]


def test_without_a_clock_it_is_1_ghz():
    task = task_of(X86)
    simulated = simulate.Simulation(1000, 2000.0, 1.0, "haswell", {0: np.zeros(1)})
    assert simulate.seconds_of(simulated, task) == pytest.approx(2e-6)
    snapdragon = load_device("snapdragon-870")
    assert [snapdragon.clock(threads) for threads in (1, 2, 4, 9)] == [3.2e9, 2.42e9, 2.42e9, 2.42e9]
