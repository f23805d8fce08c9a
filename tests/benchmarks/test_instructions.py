"""Counts of executed instructions: exact, repeatable, of the kernel alone, and no more than were committed."""

from pathlib import Path

import pytest

from agq_tvm.boards.emulate import find_emulator
from agq_tvm.errors import AgqError
from agq_tvm.targets import load_device
from agq_tvm.tuning import core_model
from agq_tvm.tuning.block_counts import Count, count_instructions
from agq_tvm.tuning.disassembly import Instruction, Region, disassemble, find_disassembler, innermost_loops, regions
from benchmarks.instructions import baseline
from benchmarks.instructions.products import DEVICES, Product, count
from tests.boards import kernels
from tests.missing import leave_out

pytestmark = pytest.mark.emulator

DEVICE = "raspberry-pi-4"


def need(find, *arguments):
    """Return what a search for a tool finds; without it skip, or in CI fail."""
    try:
        return find(*arguments)
    except AgqError as error:
        leave_out("counts of instructions", error)


@pytest.fixture(scope="module")
def emulator():
    return need(find_emulator)


@pytest.fixture(scope="module")
def counted(emulator, tmp_path_factory):
    """A product of one row and one of eight."""
    products = [Product(DEVICE, "neon", rows, "per-token-group", 4, 8) for rows in (1, 8)]
    return list(count(products, tmp_path_factory.mktemp("counted")))


def test_counts_are_the_same_every_time_and_made_of_blocks(emulator, tmp_path):
    device, tensors = load_device(DEVICE), ["float32:64"] * 3
    library = kernels.library(kernels.Add, DEVICE, tmp_path)
    first, second = (count_instructions(Path(library), "add", tensors, device) for _ in range(2))
    assert first == second
    assert sum(size * runs for size, runs in first.blocks.values()) == first.instructions > 16


def test_a_product_of_more_rows_takes_more_instructions(counted):
    one, eight = counted
    assert eight.multiply.instructions > 4 * one.multiply.instructions
    assert 0.5 < one.ratio < eight.ratio < 16


def test_what_does_not_run_is_said(emulator, tmp_path):
    library = kernels.library(kernels.Add, DEVICE, tmp_path)
    with pytest.raises(AgqError, match="no such function"):
        count_instructions(Path(library), "subtract", [], load_device(DEVICE))


def test_executed_instructions_and_their_multiplies(counted):
    """Every multiply-accumulate is in a multiply of 8 or 16 bytes, and what is executed is in the listing."""
    one, device = counted[0], load_device(DEVICE)
    need(find_disassembler, device)
    found = regions(disassemble(one.library, device), one.multiply)
    assert 0.98 * one.multiply.instructions <= sum(region.executed for region in found) <= one.multiply.instructions
    multiplies = sum(region.runs * sum(map(core_model.is_multiply, region.instructions)) for region in found)
    assert one.product.macs / 16 <= multiplies <= one.product.macs / 8
    unpacking = core_model.unpacking(disassemble(one.library, device), one.multiply)
    assert one.product.macs / 64 <= unpacking < one.multiply.instructions / 2


def listing(*targets):
    """Return instructions of which some jump: addresses 0, 4, ..., each with the place it jumps to, or None."""
    targets = enumerate(targets)
    return {4 * at: Instruction(4 * at, "b.ne", "", None if to is None else 4 * to) for at, to in targets}


def test_blocks_that_overlap_are_summed_and_cut_at_loops():
    """QEMU's block of a loop's first round begins before the loop; the next ones begin at its head."""
    blocks = {0: (5, 3), 8: (3, 21), 20: (1, 3)}
    before, loop, after = regions(listing(None, None, None, None, 2, None), Count(0, blocks))
    assert [len(region.instructions) for region in (before, loop, after)] == [2, 3, 1]
    assert [region.runs for region in (before, loop, after)] == [3, 24, 3]


def test_loops_of_as_many_rounds_stay_apart():
    blocks = {0: (2, 7), 8: (3, 7)}
    first, second = regions(listing(None, 0, None, None, 2), Count(0, blocks))
    assert [first.executed, second.executed] == [14, 21]


def test_loops_with_others_inside_are_left_out():
    assert innermost_loops(listing(None, None, 1, None, 3, 0).values()) == [(4, 8), (12, 16)]


def test_beside_dot_products_other_multiplies_are_none_of_the_products():
    """`mul` puts codes on a grid, `mla` scales sums; without dot products these may be what multiplies."""
    words = ("v0.4s, v1.16b, v2.4b[0]", "v0.16b, v1.16b, v2.16b", "v0.4s, v1.4s, v2.4s")
    dot, grid, scale = (
        Instruction(0, name, text, None) for name, text in zip(("sdot", "mul", "mla"), words, strict=True)
    )
    for others, expected in (([dot], [True, False, False]), ([], [True, True, True])):
        is_product = core_model.products_in([Region((grid, scale), 3), Region(tuple(others), 5)])
        assert list(map(is_product, (dot, grid, scale))) == expected


def test_cycles_against_the_multiply_unit(counted):
    need(core_model.find_simulator)
    one, device = counted[1], load_device(DEVICE)
    cycles = core_model.simulate(disassemble(one.library, device), one.multiply, device)
    assert cycles.core == "cortex-a72" and cycles.covered >= 0.99
    assert one.product.macs / 16 <= cycles.bound <= cycles.cycles
    assert 0 < cycles.loop_bound <= cycles.loop_cycles <= cycles.cycles


@pytest.mark.parametrize("device", [*DEVICES, *baseline.X86_DEVICES])
def test_no_kernel_has_become_slower(request, device, tmp_path):
    if device in DEVICES:
        request.getfixturevalue("emulator")
    else:
        need(find_disassembler, load_device(device))
    committed = {name: figure for name, figure in baseline.read_baseline().items() if name.startswith(f"{device} ")}
    found = baseline.differences(committed, baseline.measure(device, tmp_path))
    assert not found, "\n".join([*found, f"if that is meant, renew the figures: {baseline.RENEW}"])


def test_what_differs_from_the_baseline_is_told():
    committed = {"slower": 1000, "faster": 1000, "alike": 1000, "gone": 1000}
    found = baseline.differences(committed, {"slower": 1021, "faster": 979, "alike": 1020, "new": 1})
    assert [line.split(":")[0] for line in found] == ["faster", "gone", "new", "slower"]
    assert "SLOWER, 1000 -> 1021, +2.1 %" in found[-1]
