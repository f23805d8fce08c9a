"""Products on integer grids: numpy, plain TIR and every tensorized kernel agree, bit for bit, up to the bounds."""

import re
from dataclasses import replace

import numpy as np
import pytest
import tvm

from agq_tvm.errors import AgqError
from agq_tvm.kernels import linear, linear_grid, tunable
from agq_tvm.kernels.instruction_sets import INSTRUCTION_SETS
from agq_tvm.kernels.intrin import grid_intrin
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.kernels.linear_grid import GridKernel, choose
from agq_tvm.quantize import integer_grid
from tests.kernels.grid_operands import at_the_bound, every_byte, grid_corners, random_grid
from tests.kernels.operands import Operands, compiled, native, target_of
from tests.kernels.spaces import sample

GRIDS = tuple(name for name, isa in INSTRUCTION_SETS.items() if isa.grids and not isa.assembly)
"""Those with loops in assembly are in `tests/boards/test_linear_grid.py`."""
# N is no multiple of any tile; K has a short last group, or fills it; codes go to memory, or stay in registers, or the
# ends of groups have scales.
FORMS = [
    GridKernel(1, 100, 150, 32, False),
    GridKernel(8, 70, 320, 64, True),
    GridKernel(6, 65, 384, 128, False),
    GridKernel(32, 100, 190, 32, True),
    GridKernel(1, 33, 20, 64, True),
    GridKernel(16, 33, 160, 32, False, activation_bits=4),
    LinearKernel(16, 70, 300, 4, 128, False, "grid", True),
    LinearKernel(6, 65, 100, 4, 32, False, "grid", False, activation_bits=4),
]


def test_there_are_instruction_sets_with_such_kernels():
    assert GRIDS == ("avx512vnni", "avx512vnni-xeon", "avxvnni")


@pytest.mark.parametrize("form", ["plain", *GRIDS])
@pytest.mark.parametrize("kernel", FORMS, ids=lambda kernel: kernel.name)
def test_exact_in_integers(kernel, form):
    """Plain TIR is the same for every instruction set but for its layout; one stands for all."""
    isa = native("generic" if form == "plain" else form)
    define = linear_grid.define if isinstance(kernel, GridKernel) else linear.define
    func = define(kernel, isa) if form == "plain" else tunable.build(kernel, isa)
    function = compiled(func, isa.name)
    for name, operands in {"random": random_grid(kernel, 1), **grid_corners(kernel)}.items():
        operands = operands.integer_form()
        expected = operands.expected().astype("float32")
        np.testing.assert_array_equal(operands.run(function, isa), expected, err_msg=name)


@pytest.mark.parametrize("isa", GRIDS)
def test_every_byte_times_every_activation_is_exact(isa):
    isa, cases = native(isa), every_byte()
    function = compiled(linear_grid.build(cases[0].kernel, isa), isa.name)
    for operands in cases:
        np.testing.assert_array_equal(operands.run(function, isa), operands.expected())


@pytest.mark.parametrize("isa", GRIDS)
def test_beyond_the_largest_step_products_leave_their_byte(isa):
    isa, kernel = native(isa), GridKernel(1, 16, 32, 32, False)
    function, base = compiled(linear_grid.build(kernel, isa), isa.name), random_grid(kernel).integer_form()
    at_most = replace(base, q=np.full_like(base.q, 15), steps=np.full_like(base.steps, 17), lows=base.lows * 0 - 128)
    np.testing.assert_array_equal(at_most.run(function, isa), at_most.expected())
    for beyond in (replace(at_most, steps=at_most.steps + 1), replace(at_most, lows=at_most.lows + 1)):
        assert (beyond.run(function, isa) != beyond.expected()).any()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("isa", GRIDS)
def test_exact_at_the_bound_of_32_bits(isa, rows):
    isa, operands = native(isa), at_the_bound(rows)
    got = operands.run(compiled(linear_grid.build(operands.kernel, isa), isa.name), isa)
    np.testing.assert_array_equal(got, operands.expected().astype("float32"))
    most = operands.kernel.channels
    with pytest.raises(AgqError, match=rf"{most + 1} channels may leave 32 bits"):
        GridKernel(rows, 16, most + 1, 128, False)
    assert GridKernel(rows, 16, most + 1, 128, False, activation_bits=4)


@pytest.mark.parametrize("kernel", [*FORMS[:4], FORMS[6]], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("isa", GRIDS)
def test_all_points_are_exact(isa, kernel):
    isa, operands = native(isa), random_grid(kernel, 2).integer_form()
    for point in sample(tunable.space_of(kernel, isa, 2)):
        function = compiled(tunable.build(kernel, isa, point), isa.name)
        np.testing.assert_array_equal(operands.run(function, isa), operands.expected(), err_msg=str(point))


@pytest.mark.parametrize("kernel", FORMS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("isa", GRIDS)
def test_scaled_result(isa, kernel):
    isa, operands = native(isa), random_grid(kernel, 3)
    expected = operands.expected()
    got = operands.run(compiled(tunable.build(kernel, isa), isa.name), isa)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * abs(expected).max())


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16, 17])
@pytest.mark.parametrize("isa,few", [("avx512vnni", 16), ("avx512vnni-xeon", 8), ("avxvnni", 8)])
def test_few_rows_take_scales_of_groups(isa, few, rows):
    """More of them where codes are not fetched while rows are multiplied."""
    kernel = choose(INSTRUCTION_SETS[isa], rows, 70, 300, 64, True, 4)
    assert isinstance(kernel, LinearKernel) == (1 < rows <= few)
    assert (kernel.rows, kernel.group_size, kernel.bias, kernel.activation_bits) == (rows, 64, True, 4)


@pytest.mark.parametrize("isa", ["dotprod", "i8mm"])
def test_loops_in_assembly_take_whole_tiles_of_rows(isa):
    isa = INSTRUCTION_SETS[isa]
    for rows, whole in ((1, False), (2, False), (4, True), (6, False), (8, True), (128, True)):
        kernel = choose(isa, rows, 70, 300, 64, True, 4)
        assert isinstance(kernel, GridKernel) == whole
        if not whole:
            with pytest.raises(AgqError, match=rf"on {isa.name} for {rows} rows in groups of 64"):
                linear_grid.build(GridKernel(rows, 70, 300, 64, True, 4), isa)


@pytest.mark.parametrize("isa", GRIDS)
def test_scales_of_groups_are_those_in_float16(isa):
    """Bit for bit: a unit times a step or a low is exact."""
    isa, kernel = native(isa), choose(INSTRUCTION_SETS[isa], 8, 70, 300, 128, True)
    operands, stored = random_grid(kernel, 4), replace(kernel, offsets="float16")
    operands.units = (np.arange(8, 16)[np.arange(70) % 8] / 64).astype("float16")[:, None]
    scales, offsets = (operands.units * part.astype("float16") for part in (operands.steps, operands.lows))
    same = Operands(stored, operands.x, operands.q, operands.sx, scales, offsets, operands.bias)
    expected = same.run(compiled(linear.build(stored, isa), isa.name), isa)
    np.testing.assert_array_equal(operands.run(compiled(linear.build(kernel, isa), isa.name), isa), expected)


@pytest.mark.parametrize("rows", [1, 128])
@pytest.mark.parametrize("isa", GRIDS)
def test_one_multiply_puts_two_codes_on_their_grid(isa, rows):
    """And sums stay in registers."""
    isa, kernel = INSTRUCTION_SETS[isa], GridKernel(rows, 64, 512, 32, False)
    func = linear_grid.build(kernel, isa)
    assembly = tvm.compile(tvm.IRModule({kernel.name: func}), target=target_of(isa.name)).mod.inspect_source("asm")
    lines = assembly.splitlines()
    assert sum(bool(re.match(r"\tvpmullw\t", line)) for line in lines) >= 2 * isa.layout_4bit.steps
    multiplies = [i for i, line in enumerate(lines) if re.match(r"\t(?:\{vex\}\t)?vpdpbusd\t", line)]
    inner = lines[multiplies[0] : multiplies[-1]]
    if isa.family == "avx512vnni":  # the other has 16 registers
        assert not [line for line in inner if re.match(r"\tvmov\w+\t%zmm\d+, .*\(", line)]


@pytest.mark.parametrize("ahead", [0, 1])
def test_many_rows_fetch_the_next_chunk(ahead):
    """All lines of it, each tile of rows its part."""
    isa, kernel = INSTRUCTION_SETS["avx512vnni-xeon"], GridKernel(24, 128, 1024, 32, False)
    func = linear_grid.build(kernel, isa, linear_grid.default(kernel, isa) | {"rows": 4, "chunk": 16, "ahead": ahead})
    loops, _, prefetches = func.script().partition("llvm.prefetch")
    assert bool(prefetches) == ahead
    lines = int(re.findall(r"in range\((\d+)\)", loops)[-1]) if ahead else 0
    assert lines == ahead * -(-64 * 512 // 2 // 64 // 6)


def test_other_instruction_sets_have_no_such_kernels():
    with pytest.raises(AgqError, match="no kernels for integer grids on neon"):
        linear_grid.build(FORMS[0], INSTRUCTION_SETS["neon"])


def test_quantizer_and_kernels_mean_the_same():
    assert grid_intrin.LARGEST_STEP == integer_grid.LARGEST_STEP and -integer_grid.LOWEST == grid_intrin.ZERO
