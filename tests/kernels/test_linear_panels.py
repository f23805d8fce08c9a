"""Loops in assembly: sums stay in their ranges, and what LLVM is given is what its registers hold."""

import re
from collections import Counter

import numpy as np
import pytest

from agq_tvm.kernels import linear_panels
from agq_tvm.kernels.instruction_sets import INSTRUCTION_SETS
from agq_tvm.kernels.intrin.assembly import (
    GRID_OPERANDS,
    GRID_UNPACK_OPERANDS,
    MAGIC,
    OPERANDS,
    UNPACK_OPERANDS,
    Form,
    unroll_of,
)
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.kernels.linear_panels import loop_for
from agq_tvm.tvm_seam import tvm
from tests.kernels.operands import target_of
from tests.kernels.test_linear import assembly_of

LOOPS = {
    f"{name} {bits}": (loop, bits)
    for name, isa in INSTRUCTION_SETS.items()
    for loop, bits in ((isa.assembly, 8), (isa.assembly_4x4, 4))
    if loop
}
_EXACT = 1 << 22
"""From here on an integer added to the bits of `MAGIC` changes its exponent."""


def as_float(dot: int) -> float:
    return float((np.float32(MAGIC).view("int32") + np.int32(dot)).view("float32"))


def test_magic_holds_22_bits():
    for dot in (0, 1, -1, _EXACT - 1, -_EXACT):
        assert as_float(dot) == MAGIC + dot
    assert as_float(_EXACT) == MAGIC + _EXACT  # 2^24, whose neighbour above is 2 away
    assert as_float(_EXACT + 1) != MAGIC + _EXACT + 1
    assert as_float(-_EXACT - 1) != MAGIC - _EXACT - 1


@pytest.mark.parametrize("name", LOOPS)
def test_sums_stay_in_range(name):
    loop, bits = LOOPS[name]
    product = 8 * (127 if bits == 8 else 7)
    assert max(loop.groups) * product * loop.code_scale(True) < _EXACT
    summed = loop.panel if loop.running else max(loop.groups)
    assert summed * product * loop.code_scale(False) < _EXACT
    assert 128 >= 8 * loop.code_scale(True)
    if not name.startswith("dotprod"):
        # Two channels of a column stand side by side, so that 16 products meet in a sum of 16 bits: half a group.
        assert (16 if bits == 8 else 32) * product < 1 << 15


@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize("name", LOOPS)
def test_scale_times_magic_is_exact(name, per_group):
    """Every float16, over the scale of codes, times `MAGIC` is a float32: else scaling would round twice."""
    scales = np.arange(1 << 16, dtype="uint16").view("float16").astype("float64")
    scales = scales[np.isfinite(scales)] / LOOPS[name][0].code_scale(per_group)
    assert ((scales * MAGIC).astype("float32") == scales * MAGIC).all()


@pytest.mark.parametrize("name", LOOPS)
def test_operands_are_known(name):
    loop = LOOPS[name][0]
    for per_group in (False, True):
        for lines, known in (
            (loop.lines(Form(per_group, 1, 8, 4)), OPERANDS),
            (loop.unpack(per_group), UNPACK_OPERANDS),
        ):
            assert set(re.findall(r"\{(\w+)\}", "\n".join(lines))) <= set(known)


@pytest.mark.parametrize("isa", [name for name, isa in INSTRUCTION_SETS.items() if isa.grids and isa.assembly])
def test_loops_of_grids(isa):
    """Their operands are known, and nothing but multiplies and loads is between the ends of a panel."""
    loop = INSTRUCTION_SETS[isa].assembly
    lines = loop.grid(4)
    for text, known in ((lines, GRID_OPERANDS), (loop.unpack_grid(4), GRID_UNPACK_OPERANDS)):
        assert set(re.findall(r"\{(\w+)\}", "\n".join(text))) - {""} <= set(known)
    body = Counter(line.split()[0] for line in lines[lines.index("1:") + 1 : lines.index("b.ne 1b")])
    multiplies = {"dotprod": ("sdot", 4 * 64), "i8mm": ("smmla", 4 * 32)}[isa]
    assert body[multiplies[0]] == multiplies[1] and body["subs"] == 1
    assert sum(body.values()) - body["subs"] - multiplies[1] == body["ld1"] + body["zip1"] + body["zip2"]


def test_rounds_divide_groups():
    assert [unroll_of(groups, 1) for groups in (1, 2, 5, 6, 8, 64)] == [1, 2, 1, 2, 4, 4]
    assert [unroll_of(64, blocks) for blocks in (1, 2, 4)] == [4, 2, 1]


@pytest.mark.parametrize("isa,count", [("dotprod", 64), ("neon", 256)])
@pytest.mark.parametrize("per_group", [False, True])
def test_a_round_has_the_multiplies_of_four_groups(isa, count, per_group):
    """However often LLVM repeats the loop."""
    isa = INSTRUCTION_SETS[isa]
    kernel = LinearKernel(8, isa.layout_4bit.width, 256, 4, 32, per_group, None, False)
    assert loop_for(kernel, isa) is isa.assembly
    blocks = re.findall(r"//APP(.*?)//NO_APP", assembly_of(kernel, isa), re.DOTALL)
    loops = [block for block in blocks if re.search(r"\t(sdot|smull)\t", block)]
    for block in loops:
        assert len(re.findall(r"^\t(?:sdot|smull2?|smlal2?)\t", block, re.MULTILINE)) == 4 * count
    assert loops


@pytest.mark.parametrize("isa", ["neon", "dotprod"])
def test_panels_of_every_size_compile(isa):
    """Small ones have codes that fit where floats were before."""
    isa = INSTRUCTION_SETS[isa]
    kernel = LinearKernel(16, 96, 576, 4, 32, True, "float16", False)
    space = linear_panels.space(kernel, isa)
    functions = {}
    for panel in space.choices["panel"]:
        functions[f"panel{panel}"] = linear_panels.build(kernel, isa, space.default | {"panel": panel})
    module = tvm.IRModule({name: func.with_attr("global_symbol", name) for name, func in functions.items()})
    assert len(functions) > 3 and tvm.compile(module, target=target_of(isa.name)).mod.inspect_source("asm")
