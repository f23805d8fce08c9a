"""All pairs of codes, and sums at their bounds and beyond, on the instruction sets of this machine."""

import pytest
import tvm

from agq_tvm.kernels.instruction_sets import INSTRUCTION_SETS
from tests.kernels.multiplies import build_all, check_bounds, check_pairs, tiles_of
from tests.kernels.operands import device_here, native

X86 = ("avx512vnni", "avx512vnni-xeon", "avxvnni", "avx2")


@pytest.mark.parametrize("isa", X86)
def test_every_pair_is_right_and_overflow_is_real(isa):
    native(isa)
    library = tvm.compile(tvm.IRModule(build_all(isa)), target=tvm.target.Target(device_here(isa).tvm_target()))
    check_pairs(isa, library.__getitem__)
    check_bounds(isa, library.__getitem__)


def test_every_multiply_is_among_those():
    """With the emulated ones, and those of 4-bit activations, which have tests of their own on a board."""
    tested = {*X86, "neon", "dotprod", "i8mm"}
    for isa in INSTRUCTION_SETS.values():
        if isa.name in tested:
            own = {isa.multiply(tile.bits, 8, tile.packed, tile.rows) for tile in tiles_of(isa.name)}
            assert own | {isa.multiply_4x4} >= {isa.multiply_4bit, isa.multiply_8bit, isa.multiply_pairs} - {None}
    assert {isa.name for isa in INSTRUCTION_SETS.values()} - tested == {"generic", "neon-paper"}
