"""Products on integer grids on emulated boards: whole products, every byte, and the largest sums, exact in integers."""

from dataclasses import replace

import numpy as np
import pytest
import tvm

from agq_tvm.kernels import tunable
from agq_tvm.kernels.instruction_sets import INSTRUCTION_SETS
from agq_tvm.kernels.linear import LinearKernel
from agq_tvm.kernels.linear_grid import GridKernel
from tests.boards import kernels
from tests.kernels.grid_operands import at_the_bound, every_byte, grid_corners, random_grid
from tests.kernels.operands import DEVICES

pytestmark = pytest.mark.emulator

# K-blocks: 5, 12 (a round of 4), 6 (of 2), 69 (more than a panel, and one left); and those whose groups have scales.
FORMS = [
    GridKernel(8, 100, 150, 32, True),
    GridKernel(4, 33, 384, 128, False),
    GridKernel(12, 65, 190, 64, False),
    GridKernel(4, 40, 2200, 32, True),
    GridKernel(16, 33, 160, 32, False, activation_bits=4),
    LinearKernel(1, 70, 300, 4, 64, False, "grid", True),
    LinearKernel(8, 33, 128, 4, 32, False, "grid", False),
    LinearKernel(6, 65, 100, 4, 32, False, "grid", False, activation_bits=4),
]
BOUND = at_the_bound(4)
ONE_ROW = replace(at_the_bound(1), kernel=LinearKernel(1, 16, BOUND.kernel.channels, 4, 128, False, "grid", False))


@pytest.fixture(scope="module", params=["dotprod", "i8mm"])
def library(request, tmp_path_factory):
    """The instruction set, and a library with all its products."""
    isa = INSTRUCTION_SETS[request.param]
    every = [*FORMS, every_byte()[0].kernel, BOUND.kernel, ONE_ROW.kernel]
    functions = {kernel.name: tunable.build(kernel, isa) for kernel in every}
    folder = tmp_path_factory.mktemp("library")
    return isa, kernels.library(tvm.IRModule(functions), DEVICES[isa.name], folder, "grids.so")


def test_whole_product_is_exact_in_integers(boards, library):
    isa, path = library
    cases = [("at the bound", BOUND), ("at the bound", ONE_ROW)]
    cases += [("every byte", operands) for operands in every_byte()]
    for kernel in FORMS:
        cases += [("random", random_grid(kernel, 1)), *grid_corners(kernel).items()]
    with boards.session(DEVICES[isa.name]) as session, kernels.loaded(session, path) as function:
        for case, operands in cases:
            operands, name = operands.integer_form(), operands.kernel.name
            got, expected = operands.run(function(name), isa), operands.expected().astype("float32")
            np.testing.assert_array_equal(got, expected, err_msg=f"{name}, {case}")
        for kernel in FORMS:
            scaled = random_grid(kernel, 3)
            got, expected = scaled.run(function(kernel.name), isa), scaled.expected()
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * abs(expected).max(), err_msg=kernel.name)


def test_beyond_the_largest_step_products_leave_their_byte(boards, library):
    isa, path = library
    base = random_grid(FORMS[0]).integer_form()
    at_most = replace(base, q=base.q * 0 + 15, steps=base.steps * 0 + 17, lows=base.lows * 0 - 128)
    with boards.session(DEVICES[isa.name]) as session, kernels.loaded(session, path) as function:
        run = function(FORMS[0].name)
        np.testing.assert_array_equal(at_most.run(run, isa), at_most.expected())
        for beyond in (replace(at_most, steps=at_most.steps + 1), replace(at_most, lows=at_most.lows + 1)):
            assert (beyond.run(run, isa) != beyond.expected()).any()
